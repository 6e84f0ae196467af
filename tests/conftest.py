"""Tests share processes: the device is chosen before any of them imports Megatron-Core or a Triton kernel."""

import os
import signal
import warnings

import torch

from m1_stages.runtime import device

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test run under nohup would hand on that it is ignored

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    device.use("auto")
