"""Tests share processes: the device is chosen before any of them imports Megatron-Core or a Triton kernel."""

import os
import warnings

import torch

from m1_stages.runtime import device

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    device.use("auto")
