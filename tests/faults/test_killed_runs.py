"""SIGKILL at random moments of a five-stage run: it always continues, loses little, and ends bit for bit where it would have.

Number 8 of docs/reliability.md.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.config import GuardConfig

SAVE_EVERY, NUM_STEPS = 2, 32


def small(folder: Path) -> Path:
    """Two layers instead of eight."""
    folder.mkdir()
    config = make_run(folder)
    text = config.read_text().replace("save_every_steps = 100", f"save_every_steps = {SAVE_EVERY}")
    text = text.replace("[curriculum]", '[curriculum]\ndecay = "relax"')
    for stage in ("32k", "128k"):
        text = text.replace(f"[stages.{stage}]\ntokens = 6144", f"[stages.{stage}]\ntokens = 12288")
    config.write_text(text.replace("[model]", "[model]\nnum_layers = 2\nsoftmax_every = 2"))
    return config


def records_of(run_dir: Path, *events: str) -> list[dict[str, Any]]:
    return events_of(run_dir / "metrics.jsonl", *events)


def exact(record: dict[str, Any]) -> str:
    keys = ("event", "stage", "step", "loss", "grad_norm", "action", "ramp", "reason", "ramp_progress", "sample_ids")
    return " ".join(repr(record[key]) for key in keys if key in record)


def killed_and_continued(
    folder: Path, *, kills: int, seed: int, bad: dict[str, float] | None = None, extra: str = ""
) -> list[int]:
    """Steps lost by each kill that cost any. ``bad``: samples that the guard has to do something about."""
    config = small(folder / "data")
    config.write_text(config.read_text() + extra)
    runs = folder / "runs"
    job = {"config": str(config), "folder": str(runs), "kills": kills, "seed": seed, "bad": bad or {}}
    (killed,) = run_on_ranks(1, "faults.killed_run_worker:kill_and_continue", job, fresh=True, timeout_s=1800)
    assert sum(killed) >= kills
    kinds = ("StepDone", "StepExcluded", "GuardNoticed")
    expected = {(r["event"], r["global_step"]): exact(r) for r in records_of(runs / "uninterrupted", *kinds)}
    assert {step for _, step in expected} == set(range(NUM_STEPS))
    final = Path("checkpoints") / f"step_{NUM_STEPS:08d}"
    weights = tensors_of(runs / "uninterrupted" / final)
    lost = []
    for number in range(len(killed)):
        run_dir = runs / str(number)
        made = records_of(run_dir, *kinds)
        assert {(r["event"], r["global_step"]): exact(r) for r in made} == expected
        assert all(exact(r) == expected[r["event"], r["global_step"]] for r in made), "also what was made twice"
        # In the background the step after a save is made while it is written, and the next save waits for it. Between
        # dropped updates nothing is saved.
        most = (2 * SAVE_EVERY if number % 2 == 0 else SAVE_EVERY) + (GuardConfig().max_consecutive_skips if bad else 0)
        lost += made_again(records_of(run_dir, "StepDone", "StepExcluded", "RolledBack"), most)
        mine = tensors_of(run_dir / final)
        assert mine.keys() == weights.keys()
        assert [name for name in mine if not torch.equal(mine[name], weights[name])] == []
        kept = [read_manifest(path).meta for path in sorted((run_dir / "checkpoints").glob("step_????????"))]
        assert [meta.stage for meta in kept if meta.stage_final] == ["32k", "128k", "256k", "512k", "1m"]
        assert list(kept[-1].extra["contexts"].values()) == [128, 512, 1024, 2048, 4096]
    return lost


def made_again(records: list[dict[str, Any]], most: int) -> list[int]:
    """Steps that each kill cost, at most ``most``; no step may be missing. A roll back is no kill."""
    lost = []
    for before, after in pairwise(records):
        if "RolledBack" in (before["event"], after["event"]):
            continue
        again = before["global_step"] + 1 - after["global_step"]
        assert 0 <= again <= most, (before["global_step"], after["global_step"])
        lost += [again] if again else []
    return lost


BAD = {f"128:{8 * 8 + 2}": 100.0, "512:6": 100.0, "512:8": 100.0, "512:10": 100.0}
"""A row of step 8 of stage 32k, and of steps 3, 4 and 5 of stage 128k, inside its ramp."""
GUARD = """
[guard]
min_steps = 4
"""


def guarded_runs(folder: Path, *, kills: int, seed: int) -> list[int]:
    lost = killed_and_continued(folder, kills=kills, seed=seed, bad=BAD, extra=GUARD)
    seen = records_of(folder / "runs" / "uninterrupted", "GuardNoticed", "RolledBack")
    did = [(r["stage"], r["step"], r["action"], r["ramp"]) for r in seen if r["event"] == "GuardNoticed"]
    assert ("32k", 8, "skip", "reverse") in did
    assert [d for d in did if d[2] != "apply" and d[0] == "128k"] == [
        ("128k", 3, "skip", "reverse"), ("128k", 4, "skip", "reverse"), ("128k", 5, "roll_back", "hold"),
    ]  # fmt: skip
    (back,) = [r for r in seen if r["event"] == "RolledBack"]
    assert (back["to_step"], back["excluded_steps"]) == (2, [2, 3, 4, 5])
    steps = {(r["stage"], r["step"]): r for r in records_of(folder / "runs" / "uninterrupted", "StepDone")}
    assert steps["128k", 10]["ramp_progress"] == pytest.approx(2 / 3), "what the guard took back stays back"
    return lost


def test_killed_five_times(tmp_path: Path) -> None:
    killed_and_continued(tmp_path, kills=5, seed=1)


def test_killed_while_the_guard_drops_updates_and_rolls_back(tmp_path: Path) -> None:
    guarded_runs(tmp_path, kills=4, seed=1)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    lost = killed_and_continued(tmp_path, kills=50, seed=2)
    print(f"steps made again after a kill: {sorted(lost)}")
    assert len(lost) >= 10, "most kills cost something, or the test kills at harmless moments only"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_killed_at_fifty_moments_with_the_guard_at_work(tmp_path: Path) -> None:
    lost = guarded_runs(tmp_path, kills=50, seed=3)
    print(f"steps made again after a kill: {sorted(lost)}")
    assert len(lost) >= 10, "most kills cost something, or the test kills at harmless moments only"
