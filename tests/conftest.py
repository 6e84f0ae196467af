"""Tests share processes: the device is chosen before any of them imports Megatron-Core."""

import warnings

from m1_stages.engine import device

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    device.use("auto")
