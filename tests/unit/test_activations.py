"""At the start of a stage: the trainer makes the plan's choice, with the memory of the smallest GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from m1_stages.config.load import load_config
from m1_stages.curriculum import plan_stage
from m1_stages.plan.estimate import make_plan
from m1_stages.plan.hardware import gpu_named
from m1_stages.plan.memory import Activations
from m1_stages.runtime.device import Device
from m1_stages.runtime.parallel import Topology
from m1_stages.training import recompute_choice as activations
from m1_stages.training.recompute_choice import choose_recompute

CPU = Device(name="cpu", torch_device=torch.device("cpu"), backend="gloo", why="")
CUDA = Device(name="cuda", torch_device=torch.device("cuda"), backend="nccl", why="")


def settled(folder: Path, stage: str, device: Device, *overrides: str, **sizes: int) -> activations.RecomputeDecision:
    (folder / "m1.toml").write_text('preset = "700m"\n')
    resolved = load_config(folder / "m1.toml", ["model.vocab_size=32000", *overrides])
    one = {f"{axis}_size": 1 for axis in ("world", "tp", "pp", "cp", "ep", "etp", "dp")}
    topology = Topology(rank=0, local_world=1, dp_rank=0, **one)  # type: ignore[arg-type]
    topology = dataclasses.replace(topology, **{f"{axis}_size": size for axis, size in sizes.items()})
    return choose_recompute(resolved.config, plan_stage(resolved, stage), topology, device)


def test_on_a_cpu_nothing_is_recomputed_unless_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = settled(tmp_path, "1m", CPU, "run.offload_activations=true")
    assert auto.activations == Activations()
    assert str(auto) == "kept: recomputation is off on CPU"
    monkeypatch.setattr(activations, "agree_min", lambda value: value)
    always = settled(tmp_path, "32k", CPU, "run.recompute=always", "run.offload_activations=true")
    assert always.activations == Activations(recompute=True, offload=True)
    assert str(always) == "recomputed, inputs in host memory: run.recompute = always"


def test_the_smallest_gpu_decides_as_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def smallest(own: float) -> float:
        asked.append(own)
        return 79.2

    monkeypatch.setattr(activations, "_free_gib", lambda device: 139.8)
    monkeypatch.setattr(activations, "agree_min", smallest)
    found = [settled(tmp_path, stage, CUDA) for stage in ("32k", "128k", "256k", "512k", "1m")]
    assert [x.activations.recompute for x in found] == [False, False, True, True, True]
    assert asked == [139.8] * 5, "every rank takes part, whatever it has"
    assert "within 90% of 79.2 GiB" in str(found[1])
    assert "more than 90% of 79.2 GiB" in str(found[2])
    stages = make_plan(load_config(tmp_path / "m1.toml"), gpu_named("h100"), 1).stages
    assert [x.activations for x in found] == [s.configured.activations for s in stages if s.configured]
    away = settled(tmp_path, "1m", CUDA, "run.offload_activations=true")
    assert away.activations == Activations(recompute=True, offload=True)
    assert settled(tmp_path, "128k", CUDA, dp=3).activations == Activations(), (
        "rows that do not divide are refused later"
    )
