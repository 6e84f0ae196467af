"""The post-norm residual: RMSNorm of ``alpha * x + beta * y``."""

from __future__ import annotations

import torch
from torch import Tensor

from m1_kernels.triton_support import takes_triton


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, *, eps: float, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Compute ``s * rsqrt(mean(s^2) + eps) * weight`` with ``s = alpha * x + beta * y``; one memory pass on a CUDA device.

    Args:
        x: [..., C], any floating dtype.
        y: like ``x``, or None: ``s = x``, and ``alpha`` and ``beta`` are ignored.
        weight: [C].
        eps: added to the mean of squares.
        alpha, beta: weights of the sum (DeepNorm: the residual's and the sublayer's).

    Returns:
        Like ``x``. Arithmetic is fp32 (fp64 for fp64 inputs), rounded once.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight.shape != x.shape[-1:] or (y is not None and y.shape != x.shape):
        other = "" if y is None else f", y {tuple(y.shape)}"
        raise ValueError(f"x is {tuple(x.shape)}{other}, weight {tuple(weight.shape)}; want [..., C] and [C]")
    if takes_triton(x):
        from m1_kernels.norm.rms_norm_triton import add_rms_norm_triton

        return add_rms_norm_triton(x, y, weight, alpha, beta, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide) if y is None else alpha * x.to(wide) + beta * y.to(wide)
    return (weight.to(wide) * (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps))).to(x.dtype)
