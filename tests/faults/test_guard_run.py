"""Whole runs with bad samples in their data: what the guard does about them, and that stopping in between changes nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

ROWS = 8
"""Per step of stage 32k: sample ``8 n`` is the first of step ``n``."""
EXTRA = """
[guard]
min_steps = 4
spike_z = 8.0
max_consecutive_skips = 2
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make_run(folder, EXTRA)
    text = (folder / "m1.toml").read_text().replace("save_every_steps = 100", "save_every_steps = 4")
    (folder / "m1.toml").write_text(text.replace("[stages.32k]\ntokens = 6144", "[stages.32k]\ntokens = 18432"))
    return folder


class Run:
    def __init__(self, prepared: Path, folder: Path, extra: str = "") -> None:
        shutil.copytree(prepared, folder)
        self.folder, self.config = folder, folder / "m1.toml"
        self.config.write_text(self.config.read_text() + extra)
        self.error = ""

    def start(self, stages: str = "32k", ranks: int = 1, **job: Any) -> int:
        job |= {"config": str(self.config), "stages": stages, "events": str(self.folder / "events.jsonl")}
        ended = run_on_ranks(ranks, "faults.guard_run_worker:train", job, fresh=True)
        self.error = ended[0]["error"]
        assert len({rank["exit"] for rank in ended}) == 1, ended
        return int(ended[0]["exit"])

    def events(self, *names: str) -> list[dict[str, Any]]:
        return events_of(self.folder / "events.jsonl", *names)

    def dropped(self) -> list[dict[str, Any]]:
        return [event for event in self.events("GuardNoticed") if event["action"] != "apply"]

    def final(self) -> dict[str, torch.Tensor]:
        return tensors_of(sorted((self.folder / "run" / "checkpoints").glob("step_????????"))[-1])


def differing(a: Run, b: Run) -> list[str]:
    mine, theirs = a.final(), b.final()
    assert mine.keys() == theirs.keys()
    assert len(mine) > 100
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def test_a_spike_is_skipped_once_and_the_budget_survives_a_restart(prepared: Path, tmp_path: Path) -> None:
    run = Run(prepared, tmp_path / "run", "skip_budget = 1\n")
    bad = {str(10 * ROWS + 3): 100, str(14 * ROWS): 100}
    assert run.start(bad=bad, stop_at=12) == 75, run.error
    (noticed,) = run.dropped()
    assert (noticed["step"], noticed["action"], noticed["skipped_in_budget"]) == (10, "skip", 1)
    assert noticed["sample_ids"] == list(range(10 * ROWS, 11 * ROWS))
    assert noticed["loss"] > 50 * noticed["median"] > 0 or noticed["series"] != "loss"
    assert run.start(bad=bad) == 0, run.error
    second = run.dropped()[1]
    assert (second["step"], second["action"], second["skipped_in_budget"]) == (14, "roll_back", 2)
    (back,) = run.events("RolledBack")
    assert (back["from_step"], back["to_step"]) == (14, 12), "the newest from before the spike and the step before it"


def test_a_run_of_spikes_is_rolled_back_and_trained_without_them(prepared: Path, tmp_path: Path) -> None:
    bad = {str(step * ROWS + 1): 100 for step in (10, 11, 12)}
    runs = Run(prepared, tmp_path / "uncut"), Run(prepared, tmp_path / "cut")
    assert runs[0].start(bad=dict(bad)) == 0, runs[0].error
    assert runs[1].start(bad=dict(bad), stop_at=6) == 75, runs[1].error
    assert runs[1].start(bad=dict(bad), stop_at=14) == 75, runs[1].error
    assert runs[1].start(bad=dict(bad)) == 0, runs[1].error
    for run in runs:
        (back,) = run.events("RolledBack")
        assert back["excluded_steps"] == [9, 10, 11, 12], "the spikes and one step before"
        assert [event["step"] for event in run.events("StepExcluded")] == [9, 10, 11, 12]
        after = run.events("RolledBack", "StepDone", "StepExcluded")
        after = after[[event["event"] for event in after].index("RolledBack") + 1 :]
        assert [event["step"] for event in after] == list(range(back["to_step"], 18))
        trained = {i for event in after if event["event"] == "StepDone" for i in event["sample_ids"]}
        assert not trained & set(back["sample_ids"])
        assert list((run.folder / "run" / "checkpoints").glob("*.rolled-back-1")) or back["to_step"] == 8
    assert differing(*runs) == []


def test_nothing_to_go_back_to(prepared: Path, tmp_path: Path) -> None:
    run = Run(prepared, tmp_path / "run", "skip_budget = 0\nmax_rollbacks = 1\n")
    text = run.config.read_text().replace("save_every_steps = 4", "save_every_steps = 100")
    run.config.write_text(text)
    assert run.start(bad={str(10 * ROWS): 100}) == 6
    assert "there is no checkpoint from before step 9" in run.error


def test_rolled_back_too_often(prepared: Path, tmp_path: Path) -> None:
    run = Run(prepared, tmp_path / "run", "skip_budget = 0\nmax_rollbacks = 1\nexclude_before = 0\n")
    bad = {str(10 * ROWS): 100, str(15 * ROWS): 100}
    for _ in range(2):  # a second start meets the same end: the record outlives the process
        assert run.start(bad=dict(bad)) == 6
        assert "rolled back 1 times already" in run.error
    assert len(run.events("RolledBack")) == 1


def test_a_passing_fault_leaves_no_trace(prepared: Path, tmp_path: Path) -> None:
    clean, faulty = Run(prepared, tmp_path / "clean"), Run(prepared, tmp_path / "faulty")
    assert clean.start() == 0
    assert faulty.start(bad={str(7 * ROWS): "nan once"}) == 0, faulty.error
    (repeated,) = faulty.events("StepRepeated")
    assert (repeated["step"], repeated["verdict"], repeated["bad_ranks"]) == (7, "transient", [0])
    assert differing(clean, faulty) == []


@pytest.mark.parametrize(("policy", "code"), [("stop", 6), ("skip", 0)])
def test_a_bad_batch_is_told_from_a_passing_fault(prepared: Path, tmp_path: Path, policy: str, code: int) -> None:
    run = Run(prepared, tmp_path / "run", f'on_nonfinite = "{policy}"\n')
    assert run.start(bad={str(7 * ROWS + 2): "nan"}) == code, run.error
    (repeated,) = run.events("StepRepeated")
    assert (repeated["step"], repeated["verdict"]) == (7, "reproducible")
    if policy == "stop":
        assert f"samples {7 * ROWS}..{8 * ROWS - 1}, rank 0" in run.error
        assert [event["step"] for event in run.events("StepDone")] == list(range(7))
    else:
        assert all(torch.isfinite(tensor).all() for tensor in run.final().values() if tensor.is_floating_point())


def test_resume_inside_a_held_ramp(prepared: Path, tmp_path: Path) -> None:
    """Stage 128k moves its decay rates; a spike takes the ramp back. Cut in between, the slopes go on exactly."""
    runs = Run(prepared, tmp_path / "uncut"), Run(prepared, tmp_path / "cut")
    for run in runs:
        text = run.config.read_text().replace("[stages.128k]\ntokens = 6144", "[stages.128k]\ntokens = 20480")
        assert "decay_ramp_share = 0.5" in text
        run.config.write_text(text)
        assert run.start() == 0, run.error
    bad = {str(3 * 2): 100}  # rows of 512 tokens, two a step
    assert runs[0].start("128k", bad=dict(bad)) == 0, runs[0].error
    for stop in (20, 22):
        assert runs[1].start("128k", bad=dict(bad), stop_at=stop) == 75, runs[1].error
    assert runs[1].start("128k", bad=dict(bad)) == 0, runs[1].error
    progress = [
        [(e["step"], e["ramp_progress"], e["half_lives"]) for e in run.events("StepDone") if e["stage"] == "128k"]
        for run in runs
    ]
    assert progress[0] == progress[1]
    moved = [p for _, p, _ in progress[0]]
    assert any(b < a for a, b in itertools.pairwise(moved)), "the spike reversed the ramp"
    assert moved[-1] > max(moved[:4]), "and it went on"
    assert run.events("StageFinished")[-1]["ramp_progress"] >= moved[-1]
    assert differing(*runs) == []


def test_spikes_at_the_start_of_a_stage_go_back_to_the_stage_before(prepared: Path, tmp_path: Path) -> None:
    run = Run(prepared, tmp_path / "run")
    assert run.start() == 0, run.error
    assert run.start("128k", bad={"0": 100, "2": 100, "4": 100}) == 0, run.error  # two rows a step
    (back,) = run.events("RolledBack")
    assert (back["from_step"], back["to_step"], back["excluded_steps"]) == (2, 0, [0, 1, 2])
    assert back["checkpoint"].endswith("step_00000018"), "the final one of stage 32k, which stays"
    trained = [event["step"] for event in run.events("StepDone") if event["stage"] == "128k"]
    assert trained == [0, 1, 3, 4, 5], "the two that were dropped are reported, and after the roll back the rest"
    assert [event["stage"] for event in run.events("StageFinished")] == ["32k", "128k"]


def test_two_ranks_roll_back_together(prepared: Path, tmp_path: Path) -> None:
    run = Run(prepared, tmp_path / "run")
    bad = {str(step * ROWS + 1): 100 for step in (10, 11, 12)}
    assert run.start(ranks=2, bad=bad) == 0, run.error
    (back,) = run.events("RolledBack")
    assert back["excluded_steps"] == [9, 10, 11, 12]
    assert run.events("StageFinished")[0]["steps"] == 18
    (record,) = json.loads((run.folder / "run" / "rollbacks.json").read_text())
    assert record["excluded_steps"] == [9, 10, 11, 12]
