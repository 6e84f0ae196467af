"""The door of the lightning kernels: checks arguments, chooses a backend and says why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from m1_kernels.lightning.chunk_layout import doc_lengths_of
from m1_kernels.lightning.chunked import lightning_attention_chunked
from m1_kernels.lightning.reference import lightning_attention_reference
from m1_kernels.lightning.zigzag import ContextShards

BACKENDS = ("auto", "reference", "chunked", "triton")
TRITON_DIMS = (16, 32, 64, 128)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def triton_refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot run on these inputs, or None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'm1cli[gpu]')"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not q.is_cuda and not interpreted:
        return f"Triton kernels need a CUDA device, not {q.device.type} (or TRITON_INTERPRET=1, for tests)"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "Triton kernels need compute capability 8.0 or newer"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"Triton kernels compute fp16, bf16 and fp32, not {q.dtype}"
    if interpreted and q.dtype == torch.bfloat16:
        return "Triton's interpreter reads bf16 as integers"
    if q.shape[-1] not in TRITON_DIMS or v.shape[-1] not in TRITON_DIMS:
        return f"Triton kernels have head sizes {TRITON_DIMS}, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def explain_backend(backend: str = "auto", q: Tensor | None = None, v: Tensor | None = None) -> tuple[str, str]:
    """The backend that runs for a request, and the reason.

    Args:
        backend: one of ``BACKENDS``.
        q: [..., Dk] inputs of the call; without them the answer is that of a machine without a CUDA device.
        v: [..., Dv]; like q if None.

    Raises:
        ValueError: unknown or unavailable backend; nothing else is chosen in its place.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("reference", "chunked"):
        return backend, "requested"
    refusal = "no inputs given" if q is None else triton_refusal(q, q if v is None else v)
    if backend == "triton":
        if refusal:
            raise ValueError(f"backend 'triton' cannot run: {refusal}; use 'chunked' or 'auto'")
        return backend, "requested"
    if refusal is None and q is not None and q.is_cuda:
        return "triton", "fastest on a CUDA device"
    return "chunked", refusal or "the Triton interpreter is for tests, and has to be requested"


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    doc_lengths: Sequence[int] | None = None,
    shards: ContextShards | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with exponential decay: ``S_t = exp(log_decay) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t``.

    No scale, no normalisation. With ``cu_seqlens`` the documents never see each other, bit for bit.

    Args:
        q: [B, T, H, Dk], fp16, bf16, fp32 or fp64.
        k: like ``q``.
        v: [B, T, H, Dv], same dtype.
        log_decay: [H] fp32 or fp64, <= 0: minus the slope. No gradient flows into it.
        cu_seqlens: [documents + 1] integer document edges from 0 to T; needs B == 1.
        initial_state: [B or documents, H, Dk, Dv] fp32 (fp64 for fp64 inputs), zeros if None.
        output_final_state: whether to return the state after each sequence.
        backend: one of ``BACKENDS``.
        doc_lengths: the same edges as lengths on the host, so that a GPU is not waited for; may stand alone.
        shards: the inputs are this rank's tokens of a sequence that is spread over a group; states are exchanged, forward
            and backward. Instead of the two arguments above; initial and final states stand for whole documents, which
            no rank holds, and are refused.

    Returns:
        o [B, T, H, Dv] in v's dtype, and the final state [B or documents, H, Dk, Dv] in fp32 (fp64), or None.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or documents that do not fit, or a backend that cannot run.
    """
    _check(q, k, v, log_decay)
    chosen, _ = explain_backend(backend, q, v)
    if shards is not None:
        if chosen == "reference" or initial_state is not None or output_final_state:
            raise ValueError("shards need backend 'chunked' or 'triton', no initial_state and no output_final_state")
        cu_seqlens, doc_lengths = None, shards.doc_lengths
        shards = shards if shards.crossed else None
    lengths = doc_lengths_of(q, cu_seqlens, doc_lengths)
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    state_shape = (len(lengths), q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and (tuple(initial_state.shape), initial_state.dtype) != (state_shape, state_dtype):
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)} {initial_state.dtype}, not {state_shape} {state_dtype}"
        )
    q, k, v_packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    if chosen == "triton":
        from m1_kernels.lightning.gpu.launch import lightning_attention_triton

        out, final = lightning_attention_triton(
            q, k, v_packed, log_decay, lengths, initial_state, output_final_state, shards
        )
        return out.view(v.shape), final
    if chosen == "reference":
        out, state = lightning_attention_reference(q, k, v_packed, log_decay, lengths, initial_state)
    else:
        out, state = lightning_attention_chunked(q, k, v_packed, log_decay, lengths, initial_state, shards)
    return out.to(v.dtype).view(v.shape), state.to(state_dtype) if output_final_state else None


def lightning_layer(
    x: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    *,
    eps: float,
    cu_seqlens: Tensor | None = None,
    doc_lengths: Sequence[int] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    shards: ContextShards | None = None,
) -> Tensor:
    """The lightning layer between its projections, fused: SiLU, attention, RMSNorm over all heads, sigmoid gate.

    ``y = rmsnorm(lightning_attention(silu(q), silu(k), silu(v))) * weight * sigmoid(gate)``; Triton only.
    Source: MiniMax-01 section 2.2; transformers ``modeling_minimax.py``, ``MiniMaxLightningAttention``.

    Args:
        x: [1, T, H, 4, D], parts q, k, v, gate, as the fused projection returns them; fp16, bf16 or fp32.
        weight: [H * D], this rank's share of the norm's weight.
        log_decay: [H] fp32 or fp64, <= 0.
        eps: of the norm.
        cu_seqlens, doc_lengths, shards: as for ``lightning_attention``.
        tp_group: ranks that share the heads; their sums of squares are added, forward and backward.

    Returns:
        [1, T, H * D] in x's dtype. The gradient of ``weight`` is of this rank's channels alone, and complete.

    Raises:
        TypeError, ValueError: as ``lightning_attention`` with backend "triton".
    """
    if x.dim() != 5 or x.shape[0] != 1 or x.shape[3] != 4 or weight.shape != (x.shape[2] * x.shape[4],):
        raise ValueError(f"x, weight are {tuple(x.shape)}, {tuple(weight.shape)}; want [1, T, H, 4, D], [H * D]")
    q = x[:, :, :, 0]
    _check(q, q, q, log_decay)
    explain_backend("triton", q)
    if shards is not None:
        cu_seqlens, doc_lengths = None, shards.doc_lengths
        shards = shards if shards.crossed else None
    lengths = doc_lengths_of(q, cu_seqlens, doc_lengths)
    from m1_kernels.lightning.gpu.fused_layer import lightning_layer_triton

    return lightning_layer_triton(x[0], weight, log_decay, lengths, eps, tp_group, shards)[None]


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, backend: str = "auto"
) -> Tensor:
    """One new token of each sequence: ``state`` becomes the state after it, in place. No gradient.

    Args:
        q: [B, H, Dk], fp16, bf16 or fp32.
        k: like ``q``.
        v: [B, H, Dv], same dtype.
        log_decay: [H] fp32, <= 0.
        state: [B, H, Dk, Dv] fp32, contiguous: what ``lightning_attention`` returned for the prefix.
        backend: "auto", "triton" or "chunked" (PyTorch).

    Returns:
        o [B, H, Dv] in v's dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    _check(q[:, None], k[:, None], v[:, None], log_decay)
    shape = (*q.shape, v.shape[2])
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {tuple(state.shape)} {state.dtype}, not contiguous {shape} torch.float32")
    chosen, _ = explain_backend(backend, q, v)
    if chosen == "reference":
        raise ValueError("lightning_decode has no backend 'reference'; use 'chunked' or 'auto'")
    with torch.no_grad():
        if chosen == "triton":
            from m1_kernels.lightning.gpu.decode import decode_triton

            return decode_triton(q, k, v, log_decay.float(), state)
        state.mul_(log_decay.float().exp()[:, None, None]).addcmul_(k.float()[..., None], v.float()[..., None, :])
        return (q.float()[..., None, :] @ state)[..., 0, :].to(v.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating dtype")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; want [B, T, H, D]")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_decay is {log_decay.dtype}; decays need fp32, bf16 rounds 9 % of them to no decay")
    if tuple(log_decay.shape) != (q.shape[2],) or log_decay.requires_grad:
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}; want [{q.shape[2]}] without gradient")
