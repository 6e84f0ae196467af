"""Rotary position embedding on the first channels of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from m1_kernels.triton_support import takes_triton


def rotary_frequencies(base: float, rotary_dim: int, device: torch.device) -> Tensor:
    """Return ``base^(-2i/rotary_dim)``, [rotary_dim / 2] fp32: the angle of pair i from one position to the next.

    They are rounded exactly as transformers rounds them: at a million tokens one unit in the last place of a frequency turns a
    pair by 0.06 rad.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    return 1.0 / base**exponents


def apply_rotary(x: Tensor, positions: Tensor, *, base: float, rotary_dim: int) -> Tensor:
    """Rotate pairs (i, i + rotary_dim/2) of the first ``rotary_dim`` channels by ``position * base^(-2i/rotary_dim)``.

    Args:
        x: [..., T, H, D], any floating dtype; angles and rotation are fp32, the result has x's dtype.
        positions: [T] integer position of each token in its document.
        base: RoPE base.
        rotary_dim: even, at most D; the remaining channels pass unchanged.

    Raises:
        ValueError: ``rotary_dim`` is odd or does not fit, or ``positions`` is not [T].
    """
    if rotary_dim % 2 or not 0 < rotary_dim <= x.shape[-1]:
        raise ValueError(f"rotary_dim is {rotary_dim}; want an even number of at most {x.shape[-1]} channels")
    if tuple(positions.shape) != (x.shape[-3],):
        raise ValueError(f"positions is {tuple(positions.shape)}, not [{x.shape[-3]}]")
    return rotate(x, positions, rotary_frequencies(base, rotary_dim, x.device))


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Compute ``apply_rotary`` with what ``rotary_frequencies`` returned; nothing is checked."""
    if takes_triton(x):
        from m1_kernels.softmax_attention.rotary_triton import apply_rotary_triton

        rows = x.reshape(-1, *x.shape[-2:])
        return apply_rotary_triton(rows, positions.repeat(rows.shape[0] // positions.shape[0]), frequencies).view(
            x.shape
        )
    half = frequencies.numel()
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
