"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits for it before it touches memory.

Saves the time between two small kernels, eagerly and in a CUDA graph. Every kernel that is launched so must call
``wait_for_previous`` first: then it also comes after all kernels before the previous one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_CAPABILITY = (9, 0)


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel before has ended and its results can be read; the next kernel may start from now on."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """The options of a launch whose kernel calls ``wait_for_previous``; below compute capability 9 nothing overlaps."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
