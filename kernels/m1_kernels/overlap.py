"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits for it before it uses its results.

Saves the time between two small kernels, eagerly and in a CUDA graph. Every kernel that is launched so must call
``wait_for_previous``: then it also comes after all kernels before the previous one.

Before that call a kernel reads nothing. But it may ``prefetch`` weights into the L2 cache, so that the memory is busy while small
kernels run: that changes no value, whoever writes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_CAPABILITY = (9, 0)
SECTOR = tl.constexpr(32)
"""Bytes that a GPU reads from its memory at least."""


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr, START_NEXT: tl.constexpr = True):
    """Wait until the kernel before has ended and its results can be read; the next kernel may start from now on."""
    if OVERLAP:
        gdc_wait()
    if START_NEXT:
        start_next(OVERLAP)


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Let the next kernel start once every program has come here: of a kernel that calls ``wait_for_previous`` without it."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def prefetch(address):
    """Bring the sectors at these addresses, int64 of any shape, into the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """The options of a launch whose kernel calls ``wait_for_previous``; below compute capability 9 nothing overlaps."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
