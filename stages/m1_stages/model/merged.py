"""The weight that a frozen matrix and its low-rank adapter are together. It needs no Megatron."""

from __future__ import annotations

from torch import Tensor


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * b a`` in fp32, rounded once, so that it hardly depends on the order of the sums.

    Args:
        weight: [..., out, in].
        a: [..., rank, in].
        b: [..., out, rank].
    """
    delta = b.double() @ a.double()
    return delta.mul_(scale).add_(weight).float()
