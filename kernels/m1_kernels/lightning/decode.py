"""Decoding with lightning attention: one token per sequence, from the recurrent state."""

from __future__ import annotations

import torch
from torch import Tensor

from m1_kernels.lightning.dispatch import check_inputs, explain_backend


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Compute one new token of each sequence and advance ``state`` by it, in place. No gradient flows.

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
    check_inputs(q[:, None], k[:, None], v[:, None], log_decay)
    shape = (*q.shape, v.shape[2])
    if tuple(state.shape) != shape or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {tuple(state.shape)} {state.dtype}, not contiguous {shape} torch.float32")
    chosen = explain_backend(backend, q, v).name
    if chosen == "reference":
        raise ValueError("lightning_decode has no backend 'reference'; use 'chunked' or 'auto'")
    with torch.no_grad():
        if chosen == "triton":
            from m1_kernels.lightning.gpu.decode import decode_triton

            return decode_triton(q, k, v, log_decay.float(), state)
        state.mul_(log_decay.float().exp()[:, None, None]).addcmul_(k.float()[..., None], v.float()[..., None, :])
        return (q.float()[..., None, :] @ state)[..., 0, :].to(v.dtype)
