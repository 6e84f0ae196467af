"""Running out of memory names the stage, what was chosen, and the first key that helps and is not set yet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.curriculum import plan_stage
from m1_stages.errors import EnvironmentProblem
from m1_stages.plan.memory import Activations
from m1_stages.runtime.parallel import Topology
from m1_stages.training.recompute_choice import RecomputeDecision, out_of_memory_explained

ONE = Topology(**{field.name: 1 for field in dataclasses.fields(Topology)})
KEPT = RecomputeDecision(activations=Activations(), why="about 60.0 GiB are needed, within 90% of 79.0 GiB")
RECOMPUTED = RecomputeDecision(activations=Activations(recompute=True), why="run.recompute = always")
OFFLOADED = RecomputeDecision(activations=Activations(recompute=True, offload=True), why="run.recompute = always")


def resolved(tmp_path: Path, *settings: str) -> Resolved:
    path = tmp_path / "m1.toml"
    path.write_text('preset = "tiny"\n')
    return load_config(path, settings)


def explained(config: Resolved, decision: RecomputeDecision, error: Exception) -> EnvironmentProblem:
    plan = plan_stage(config, "1m")
    with pytest.raises(EnvironmentProblem) as caught, out_of_memory_explained(config.config, plan, ONE, decision):
        raise error
    return caught.value


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("settings", "decision", "gpu", "fix"),
    [
        (["stages.1m.micro_batch_rows=8"], KEPT, True, "stages.1m.micro_batch_rows=2"),  # 4 rows a step
        ([], KEPT, True, "run.recompute=always"),
        ([], RECOMPUTED, True, "run.offload_activations=true"),
        ([], RECOMPUTED, False, "parallel.context=2"),
        ([], OFFLOADED, True, "optim.offload=true"),
        (["optim.offload=true", "parallel.context=2"], OFFLOADED, True, "parallel.context=4"),
    ],
)
def test_the_next_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    decision: RecomputeDecision,
    gpu: bool,
    fix: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = resolved(tmp_path, "stages.1m.micro_batch_rows=1", "stages.1m.global_batch_tokens=16384", *settings)
    assert config.config.global_batch_rows("1m") == 4
    for error in (GPU, CPU):
        told = explained(config, decision, error)
        assert told.exit_code == 3
        assert told.what.startswith("stage 1m ran out of memory with rows of 4,096 tokens: ")
        assert str(error).splitlines()[0] in told.what
        assert "more lines" not in told.what
        assert f"[stages.1m]; activations {decision}" == told.where
        assert f"--set {fix}" in told.fix


def test_other_errors_pass(tmp_path: Path) -> None:
    config = resolved(tmp_path)
    with (
        pytest.raises(RuntimeError, match="shapes do not match"),
        out_of_memory_explained(config.config, plan_stage(config, "1m"), ONE, KEPT),
    ):
        raise RuntimeError("shapes do not match")
