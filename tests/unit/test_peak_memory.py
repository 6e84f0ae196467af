"""The peak memory of a step is that of its stage on a GPU: a later stage does not report an earlier one's."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from m1_stages.guard import GuardState
from m1_stages.runtime.device import Device
from m1_stages.training.loop import train_stage
from m1_stages.training.train_state import TrainState

GPU = Device(name="cuda", torch_device=torch.device("cuda", 1), backend="nccl", why="a test says so")
CPU = Device(name="cpu", torch_device=torch.device("cpu"), backend="gloo", why="a test says so")


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices whose peak was reset; 3 GiB is the peak of each since."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    return seen


def test_the_peak_of_the_device_that_the_process_uses(resets: list[torch.device]) -> None:
    GPU.reset_peak_memory()
    CPU.reset_peak_memory()
    assert resets == [torch.device("cuda", 1)]
    assert GPU.peak_memory_gib() == 3.0
    assert 0.01 < CPU.peak_memory_gib() < 1000.0


def test_every_stage_starts_a_new_peak(resets: list[torch.device]) -> None:
    run: Any = mock.Mock(device=GPU)
    run.topology.pp_size = 1
    run.stop.received = ""
    for stage in ("32k", "128k"):
        plan: Any = mock.Mock(stage=stage, num_steps=0, slopes_new=[[0.5]])
        state = TrainState(stage=stage, slopes=[[0.5]], guard=GuardState())
        train_stage(run, plan, mock.Mock(), state, mock.Mock())
    assert resets == [torch.device("cuda", 1)] * 2
