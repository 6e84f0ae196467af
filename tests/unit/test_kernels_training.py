"""A tiny model trained with the fp32 kernel follows float64, and a wrong decay would show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_training.py"


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_fp32_kernel_follows_float64_for_50_steps(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    size = training.Size(heads=2, head_dim=16, width=16, lengths=(23, 17), layers=2, steps=50, lr=5e-3)
    reference = training.train(size, training.REFERENCE, 0, DEVICE)
    fp32 = training.train(size, training.KERNELS["fp32"], 0, DEVICE)
    assert 0 < max(training.distances(fp32, reference)) < training.FP32_BOUND
    assert sum(reference[-5:]) / 5 < sum(reference[:5]) / 5 - 0.3

    right = training.slopes
    monkeypatch.setattr(training, "slopes", lambda *args: 1.05 * right(*args))
    wrong = training.train(size, training.REFERENCE, 0, DEVICE)
    assert max(training.distances(wrong, reference)) > 10 * training.FP32_BOUND
