"""Lightning attention: checks arguments, chooses the backend once and says why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m1_kernels.backend_choice import BackendChoice
from m1_kernels.lightning.chunk_layout import doc_lengths_of
from m1_kernels.lightning.chunked import lightning_attention_chunked
from m1_kernels.lightning.reference import lightning_attention_reference
from m1_kernels.lightning.zigzag import ContextShards
from m1_kernels.triton_support import lightning_refusal

BACKENDS = ("auto", "reference", "chunked", "triton")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_sizes: tuple[int, int], backend: str = "auto"
) -> BackendChoice:
    """Choose the backend of lightning attention for inputs that need not exist yet.

    Args:
        device: where the inputs are.
        dtype: their dtype.
        head_sizes: channels of a head of q and k, and of v.
        backend: the request, one of ``BACKENDS``.

    Raises:
        ValueError: the backend is unknown or cannot run; nothing else is chosen in its place.
    """
    refusal = None if backend in ("reference", "chunked") else lightning_refusal(device, dtype, head_sizes)
    return _choose(backend, refusal, on_cuda=device.type == "cuda")


def explain_backend(backend: str = "auto", q: Tensor | None = None, v: Tensor | None = None) -> BackendChoice:
    """Choose the backend of lightning attention for given inputs, as ``choose_backend`` does.

    Args:
        backend: the request, one of ``BACKENDS``.
        q: [..., Dk] inputs of the call; without them the answer is that of a machine without a CUDA device.
        v: [..., Dv]; like q if None.

    Raises:
        ValueError: the backend is unknown or cannot run; nothing else is chosen in its place.
    """
    if q is None:
        return _choose(backend, "no inputs given", on_cuda=False)
    return choose_backend(q.device, q.dtype, (q.shape[-1], (q if v is None else v).shape[-1]), backend)


def _choose(backend: str, refusal: str | None, *, on_cuda: bool) -> BackendChoice:
    """The rule. ``refusal``: why Triton cannot run, or None."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("reference", "chunked"):
        return BackendChoice(backend, "requested")
    if backend == "triton":
        if refusal:
            raise ValueError(f"backend 'triton' cannot run: {refusal}; use 'chunked' or 'auto'")
        return BackendChoice(backend, "requested")
    if refusal is None and on_cuda:
        return BackendChoice("triton", "fastest on a CUDA device")
    return BackendChoice("chunked", refusal or "the Triton interpreter is for tests, and has to be requested")


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | BackendChoice = "auto",
    doc_lengths: Sequence[int] | None = None,
    shards: ContextShards | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute causal linear attention with decay: ``S_t = exp(log_decay) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t``.

    Nothing is scaled or normalised. With ``cu_seqlens`` the documents never see each other, bit for bit. Source: MiniMax-01
    (arXiv 2501.08313), section 2.2.

    Args:
        q: [B, T, H, Dk], fp16, bf16, fp32 or fp64.
        k: like ``q``.
        v: [B, T, H, Dv], same dtype.
        log_decay: [H] fp32 or fp64, <= 0: minus the slope. No gradient flows into it.
        cu_seqlens: [documents + 1] integer document edges from 0 to T; needs B == 1.
        initial_state: [B or documents, H, Dk, Dv] fp32 (fp64 for fp64 inputs), zeros if None.
        output_final_state: whether to return the state after each sequence.
        backend: one of ``BACKENDS``, or a choice that the caller has made for these inputs.
        doc_lengths: tokens of each document, on the host. They spare the wait for a GPU's ``cu_seqlens``, and replace them
            where those are None.
        shards: given when the inputs are this rank's tokens of a sequence that is sharded over a group. The ranks exchange
            states, forward and backward. ``shards`` replaces ``cu_seqlens`` and ``doc_lengths``. Initial and final
            states belong to whole documents, which no rank holds, and are refused.

    Returns:
        o [B, T, H, Dv] in v's dtype, and the final state [B or documents, H, Dk, Dv] in fp32 (fp64), or None.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or documents that do not fit, or a backend that cannot run.
    """
    check_inputs(q, k, v, log_decay)
    choice = backend if isinstance(backend, BackendChoice) else explain_backend(backend, q, v)
    chosen = choice.name
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


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    """Refuse inputs [B, T, H, D] and decay rates [H] whose shapes or dtypes do not fit together.

    Raises:
        TypeError: the dtypes do not fit.
        ValueError: the shapes do not fit, or ``log_decay`` wants a gradient.
    """
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating dtype")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; want [B, T, H, D]")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_decay is {log_decay.dtype}; decays need fp32, bf16 rounds 9 % of them to no decay")
    if tuple(log_decay.shape) != (q.shape[2],) or log_decay.requires_grad:
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}; want [{q.shape[2]}] without gradient")
