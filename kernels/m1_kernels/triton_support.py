"""Where the fused element-wise kernels run: on CUDA tensors, if Triton is there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def _device_takes_triton(index: int) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def takes_triton(x: Tensor) -> bool:
    """Whether ``x`` goes to a Triton kernel; plain PyTorch computes the same elsewhere."""
    return x.is_cuda and x.dtype != torch.float64 and _device_takes_triton(x.device.index or 0)
