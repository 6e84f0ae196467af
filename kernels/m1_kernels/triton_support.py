"""The checks whether Triton kernels can run. Each gives the reason against them in words, or None."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from m1_kernels.backend_choice import BackendChoice

LIGHTNING_HEAD_SIZES = (16, 32, 64, 128)
_CAPABILITY = (8, 0)


def lightning_refusal(device: torch.device, dtype: torch.dtype, head_sizes: tuple[int, int]) -> str | None:
    """Say why the Triton kernels of lightning attention cannot run, or None if they can.

    They also run in Triton's interpreter (``TRITON_INTERPRET=1``), which tests use on a CPU.

    Args:
        device: where the inputs are.
        dtype: their dtype.
        head_sizes: channels of a head of q and k, and of v.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    refusal = _refusal(device, interpreted=interpreted)
    if refusal is not None:
        return refusal
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"Triton kernels compute fp16, bf16 and fp32, not {dtype}"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter reads bf16 as integers"
    if any(size not in LIGHTNING_HEAD_SIZES for size in head_sizes):
        return f"Triton kernels have head sizes {LIGHTNING_HEAD_SIZES}, not {head_sizes[0]} and {head_sizes[1]}"
    return None


@cache
def elementwise_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the fused element-wise kernels (norm, rotary, SwiGLU, cross-entropy) cannot run, or None if they can."""
    if device.type == "cuda" and dtype == torch.float64:
        return "the element-wise Triton kernels do not compute float64"
    return _refusal(device, interpreted=None)


def takes_triton(x: Tensor) -> bool:
    """Whether ``x`` goes to a fused element-wise kernel; plain PyTorch computes the same elsewhere."""
    return elementwise_refusal(x.device, x.dtype) is None


def choose_elementwise_backend(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """Return the backend of the element-wise kernels, "triton" or "pytorch", and the reason."""
    refusal = elementwise_refusal(device, dtype)
    if refusal is None:
        return BackendChoice("triton", "one pass over memory on a CUDA device")
    return BackendChoice("pytorch", refusal)


def _refusal(device: torch.device, *, interpreted: bool | None) -> str | None:
    """The checks that all Triton kernels share. ``interpreted`` is None for kernels that use the device only."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'm1cli[gpu]')"
    if device.type != "cuda" and not interpreted:
        interpreter = "" if interpreted is None else " (or TRITON_INTERPRET=1, for tests)"
        return f"Triton kernels need a CUDA device, not {device.type}{interpreter}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "Triton kernels need compute capability 8.0 or newer"
    return None
