"""A run that changes its number of processes trains the same rows in the same steps, with the same decay rates.

Stage 32k is steps 0-5, stage 128k steps 6-11; the decay ramp moves during 6-8. Ranks x micro-batch rows is the same
everywhere, because the balance loss is taken over the rows that are processed together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import filled_once, run_on_ranks
from support.tiny_checkpoint import contents_of
from support.tiny_run import make_run

from m1_stages.checkpoint.manifest import read_manifest

STEPS, ROWS, MOST_RANKS = 12, 8, 4
RUNS: dict[str, list[tuple[int, int]]] = {
    "one": [(1, STEPS)],
    "two": [(2, STEPS)],
    "four": [(4, STEPS)],
    "changing": [(4, 2), (2, 6), (1, 1), (4, 3)],
}
"""Data-parallel sizes of a run's parts and the steps they make: cut inside stage 32k and twice inside the ramp."""
SETTINGS = [
    "stages.32k.tokens=6144",
    "stages.32k.global_batch_tokens=1024",
    "stages.128k.tokens=24576",
    "stages.128k.global_batch_tokens=4096",
    "optim.eps=1e-8",
    "run.threads=1",
    "run.keep_last=9",
    'run.device="cpu"',
]


def jobs() -> list[dict[str, Any]]:
    planned = []
    for name, parts in RUNS.items():
        step = 0
        for part, (world, steps) in enumerate(parts):
            step += steps
            micro = [f"stages.{stage}.micro_batch_rows={4 // world}" for stage in ("32k", "128k")]
            planned.append(
                {"name": name, "part": part, "world": world, "stages": ["32k", "128k"], "set": SETTINGS + micro,
                 "stop_at": step - 1 if step < STEPS else -1}
            )  # fmt: skip
    return planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        make_run(folder)
        for job in jobs():
            run_on_ranks(job["world"], "distributed.elastic_worker:work", {**job, "folder": str(folder)})

    return filled_once(tmp_path_factory, "elastic", fill)


def given(folder: Path, name: str) -> list[list[dict[str, Any]]]:
    """What each rank was given, by step."""
    steps: list[list[dict[str, Any]]] = []
    for part, (world, count) in enumerate(RUNS[name]):
        ranks = []
        for rank in range(MOST_RANKS):
            path = folder / f"{name}-{part}-{rank}.jsonl"
            assert path.exists() == (rank < world)
            if rank < world:
                ranks.append([json.loads(line) for line in path.read_text().splitlines()])
        assert [len(lines) for lines in ranks] == [count] * world, f"part {part}"
        steps += [list(at) for at in zip(*ranks, strict=True)]
    return steps


def rows(ranks: list[dict[str, Any]]) -> dict[int, str]:
    """Rows of one step from all ranks and micro-batches."""
    found: dict[int, str] = {}
    for rank in ranks:
        for micro_batch in rank["rows"]:
            assert not found.keys() & {int(i) for i in micro_batch}, "a row was trained twice in a step"
            found |= {int(i): digest for i, digest in micro_batch.items()}
    return found


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "StepDone"]


def train_state(folder: Path, name: str, step: int) -> dict[str, Any]:
    state: dict[str, Any] = contents_of(folder / name / "checkpoints" / f"step_{step:08d}")["common"]["train_state"]
    return state


@pytest.mark.parametrize("name", RUNS)
def test_each_step_trains_the_rows_that_one_process_trains(folder: Path, name: str) -> None:
    steps, alone = given(folder, name), given(folder, "one")
    assert [rows(ranks) for ranks in steps] == [rows(ranks) for ranks in alone], "ids, tokens, labels, masks, positions"
    reported = [event["sample_ids"] for event in events(folder, name)]
    assert reported == [sorted(rows(ranks)) for ranks in steps], "metrics.jsonl says what was really trained"
    assert reported == [list(range(step % 6 * ROWS, (step % 6 + 1) * ROWS)) for step in range(STEPS)]
    hashes = [digest for ranks in steps for digest in rows(ranks).values()]
    assert len(set(hashes)) == len(hashes) == STEPS * ROWS, "all rows differ"


@pytest.mark.parametrize("name", RUNS)
def test_micro_batches_of_all_ranks_are_the_same_rows_together(folder: Path, name: str) -> None:
    """The m-th micro-batches of a step: four rows, whoever has them."""
    worlds = [world for world, count in RUNS[name] for _ in range(count)]
    for step, (ranks, world) in enumerate(zip(given(folder, name), worlds, strict=True)):
        together = defaultdict(list)
        for rank in ranks:
            for number, micro_batch in enumerate(rank["rows"]):
                assert len(micro_batch) == 4 // world
                together[number] += [int(i) for i in micro_batch]
        first = step % 6 * ROWS
        assert together == {0: list(range(first, first + 4)), 1: list(range(first + 4, first + 8))}


@pytest.mark.parametrize("name", RUNS)
def test_the_run_goes_on_as_one_process_would(folder: Path, name: str) -> None:
    mine, alone = events(folder, name), events(folder, "one")
    for key in ("stage", "step", "global_step", "tokens_seen", "trained_tokens", "lr", "ramp_progress"):
        assert [event[key] for event in mine] == [event[key] for event in alone], key
    assert [event["global_step"] for event in mine] == list(range(STEPS))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(mine, alone, strict=True)) < 2e-6
    assert alone[0]["loss"] - alone[-1]["loss"] > 0.3, "the run must learn, or equality says little"


@pytest.mark.parametrize("name", RUNS)
def test_decay_ramp_is_the_same(folder: Path, name: str) -> None:
    """Rates that every rank used in every step, and what the checkpoints say of them."""
    used = [rank["decay"] for ranks in given(folder, "one") for rank in ranks]
    for step, ranks in enumerate(given(folder, name)):
        assert [rank["decay"] for rank in ranks] == [used[step]] * len(ranks), f"step {step}"
    moving = [step for step in range(1, STEPS) if used[step] != used[step - 1]]
    assert moving == [7, 8, 9], "the ramp starts at the old rates and reaches the new ones after three steps"
    for step in (6, 12):
        mine, alone = train_state(folder, name, step), train_state(folder, "one", step)
        rounded: dict[str, Any] = {
            "first_loss": 0,
            "guard": {},
        }  # measured: equal to the rounding of another order of sums
        assert mine | rounded == alone | rounded
        decay = read_manifest(folder / name / "checkpoints" / f"step_{step:08d}").meta.decay
        assert decay["slopes"] == mine["slopes"]


def test_the_run_really_changed(folder: Path) -> None:
    """Saved in the ramp by two processes, by one, and by four; each time the next part knew the slopes."""
    checkpoints = sorted((folder / "changing" / "checkpoints").glob("step_*"))
    found = {meta.global_step: meta for meta in (read_manifest(path).meta for path in checkpoints)}
    assert {step: meta.topology["dp"] for step, meta in found.items()} == {2: 4, 6: 2, 8: 2, 9: 1, 12: 4}
    assert [found[step].stage_final for step in (2, 6, 8, 9, 12)] == [False, True, False, False, True]
    states = [train_state(folder, "changing", step) for step in (6, 8, 9, 12)]
    assert [round(3 * state["ramp_progress"], 6) for state in states] == [0, 2, 3, 3]
    decay = [ranks[0]["decay"] for ranks in given(folder, "one")]
    for step in (2, 6, 8, 9, 12):
        slopes = train_state(folder, "changing", step)["slopes"]
        fp32 = [torch.tensor(row).tolist() for row in slopes]
        assert [row for row, used in zip(fp32, decay[step - 1], strict=True) if used] == [
            r for r in decay[step - 1] if r
        ]
