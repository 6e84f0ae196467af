"""Whole runs in one process: the learning rates that reach the optimizer, and the ramp progress that a stage ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.tiny_run import make_run

from m1_stages.events import StageFinished


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("prepared"))


def test_learning_rates_reach_the_optimizer_in_pretraining_and_fine_tuning(config: Path, tmp_path: Path) -> None:
    """Six steps of 32k: a third warms up, one more is constant, two decay to a sixteenth, by a quarter each."""
    settings = [f"run.dir={tmp_path}/run", "stages.32k.lr_peak=0.0016", "stages.32k.lr_final=0.0001",
                "stages.32k.lr_warmup_share=0.34", "stages.32k.lr_constant_share=0.17"]  # fmt: skip
    job = {"config": str(config), "stages": "32k", "set": settings, "events": str(tmp_path / "events.jsonl")}
    (ended,) = run_on_ranks(1, "distributed.schedule_worker:watched_pretraining", job)
    assert ended["exit"] == 0, ended["error"]
    reported = [event["lr"] for event in events_of(tmp_path / "events.jsonl", "StepDone")]
    assert reported == pytest.approx([0.0008, 0.0016, 0.0016, 0.0016, 0.0004, 0.0001], rel=1e-9)
    assert ended["rates"] == [[lr] for lr in reported]

    chats = [
        {"messages": [{"role": "user", "content": f"{n} + 1 ?"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    settings += ["sft.base_stage=32k", f'sft.data=["{tmp_path}/chats.jsonl"]', "sft.global_batch_tokens=1024",
                 "sft.lr_peak=0.0016", "sft.lr_final=0.0001", "sft.lr_warmup_share=0.3", "sft.epochs=3.5"]  # fmt: skip
    job = {"config": str(config), "set": settings}
    (ended,) = run_on_ranks(1, "distributed.schedule_worker:watched_fine_tuning", job)
    near_peak, near_final = (0.0001 + 0.0015 * (0.5 + sign * 2**0.5 / 4) for sign in (1, -1))
    cosine = [0.0008, 0.0016, 0.0016, near_peak, 0.00085, near_final, 0.0001]  # two of seven steps warm up
    assert ended["lr"] == pytest.approx(cosine, rel=1e-9)
    assert ended["rates"] == [[lr] for lr in ended["lr"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["guard.ramp=clock", "curriculum.decay_ramp_share=0.5"], 1.0),
        (["guard.ramp=clock", "curriculum.decay_ramp_share=1.0"], 0.99),
        (["guard.in_band_steps=9", "curriculum.decay_ramp_share=1.0"], 4 / 6),
        (["guard.in_band_steps=99"], 0.0),
    ],
    ids=[
        "over before the end",
        "the last step moved it but was not trained on it",
        "held for two steps",
        "held throughout",
    ],
)
def test_the_ramp_progress_that_a_stage_ends_with(
    config: Path, tmp_path: Path, settings: list[str], expected: float
) -> None:
    """1 is said only of slopes that a step was trained with, so that whoever reads it knows the model ended on them."""
    events = tmp_path / "events.jsonl"
    job = {"config": str(config), "stages": ["32k", "128k"], "events": str(events),
           "set": [f"run.dir={tmp_path}/run", "curriculum.decay=relax", *settings]}  # fmt: skip
    (ended,) = run_on_ranks(1, "support.pretraining:pretrained", job)
    assert ended["exit"] == 0, ended["error"]
    finished: list[dict[str, Any]] = events_of(events, StageFinished.__name__)
    assert [event["ramp_progress"] for event in finished] == [1.0, pytest.approx(expected, rel=1e-12, abs=0)]
