"""The door of the lightning kernels: checks arguments, chooses a backend and says why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m1_kernels.chunked import lightning_attention_chunked
from m1_kernels.layout import doc_lengths_of
from m1_kernels.reference import lightning_attention_reference

BACKENDS = ("auto", "reference", "chunked", "triton")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def explain_backend(backend: str = "auto") -> tuple[str, str]:
    """The backend that runs for a request, and the reason.

    Raises:
        ValueError: unknown or unavailable backend; nothing else is chosen in its place.
    """
    if backend == "auto":
        return "chunked", "the fastest backend of this version on every device"
    if backend == "triton":
        raise ValueError("backend 'triton' does not exist in this version; use 'chunked' or 'auto'")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend, "requested"


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

    Returns:
        o [B, T, H, Dv] in v's dtype, and the final state [B or documents, H, Dk, Dv] in fp32 (fp64), or None.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or documents that do not fit, or a backend that cannot run.
    """
    chosen, _ = explain_backend(backend)
    _check(q, k, v, log_decay)
    lengths = doc_lengths_of(q, cu_seqlens, doc_lengths)
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    state_shape = (len(lengths), q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and (tuple(initial_state.shape), initial_state.dtype) != (state_shape, state_dtype):
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)} {initial_state.dtype}, not {state_shape} {state_dtype}"
        )
    run = lightning_attention_reference if chosen == "reference" else lightning_attention_chunked
    q, k, v_packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out, state = run(q, k, v_packed, log_decay, lengths, initial_state)
    return out.to(v.dtype).view(v.shape), state.to(state_dtype) if output_final_state else None


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating dtype")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; want [B, T, H, D]")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_decay is {log_decay.dtype}; decays need fp32, bf16 rounds 9 % of them to no decay")
    if tuple(log_decay.shape) != (q.shape[2],) or log_decay.requires_grad:
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}; want [{q.shape[2]}] without gradient")
