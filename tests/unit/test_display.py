"""What is shown while a run trains: tokens per second and time left are those of the clock and of the whole command."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from support.plans import resolved
from support.run_events import stage_started, step_done

from m1_stages.config import STAGE_NAMES
from m1_stages.event_values import LaterStages
from m1_stages.events import Event, StageFinished, StageStarted
from m1_stages.plan.flops import training_flops
from m1_stages.plan.hardware import GPUS, gpu_of_device
from m1_stages.plan.layout import Layout
from m1_stages.plan.search import step_costs
from m1_stages.plan.stage_workload import model_with_vocab, stage_workloads
from m1cli import display as module
from m1cli.display import TrainingDisplay
from m1cli.pace import Left, Pace

TOKENS = 512
"""Tokens of a step of these stages: 4 rows of 128."""


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def before(stage: StageStarted, steps: float, *stages: str) -> StageStarted:
    return dataclasses.replace(
        stage, later=LaterStages(stages=list(stages), cost_in_steps=steps, basis="the FLOPs that m1 plan counts")
    )


def measured(clock: Clock, pace: Pace, stage: StageStarted, seconds: list[float]) -> Left | None:
    """Start ``stage`` and make steps that take ``seconds`` by the clock."""
    pace.stage_started(stage)
    for took in seconds:
        clock.now += took
        pace.step_done()
    return pace.left(step_done(stage.stage, len(seconds) - 1))


def test_tokens_per_second_are_by_the_clock() -> None:
    clock = Clock()
    pace = Pace(clock)
    measured(clock, pace, stage_started("32k"), [2.0, 2.0, 10.0])  # a save before the third
    assert pace.tokens_per_s() == pytest.approx(3 * TOKENS / 14.0)
    measured(clock, pace, stage_started("128k"), [4.0])
    assert pace.tokens_per_s() == TOKENS / 4, "steps of this stage only"
    measured(clock, pace, stage_started("256k"), [5.0] * 7 + [0.25] * 20)
    assert pace.tokens_per_s() == TOKENS * 4, "the last 20 steps"


def test_nothing_is_estimated_from_warm_up_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert measured(clock, pace, stage_started("32k"), [90.0, 9.0, 9.0]) is None
    left = measured(clock, pace, stage_started("128k"), [90.0, 9.0, 9.0, 1.0, 3.0])
    assert left is not None
    assert left.stage_s == 5 * 2.0, "five of ten steps are left, the last two took 1 s and 3 s"


def test_time_left_is_that_of_all_stages_to_come() -> None:
    clock = Clock()
    pace = Pace(clock)
    first = before(stage_started("32k"), 12.5, "128k", "256k")
    assert measured(clock, pace, first, [9.0] * 3 + [2.0] * 3) == Left(stage_s=8.0, command_s=33.0, ends=3)
    clock.now += 6.0  # the last save, and the evaluation
    second = before(stage_started("128k"), 4.0, "256k")
    assert measured(clock, pace, second, [9.0] * 3 + [3.0]) == Left(stage_s=18.0, command_s=30.0 + 2 * 6.0, ends=0)
    clock.now += 8.0
    assert measured(clock, pace, stage_started("256k"), [9.0] * 3 + [1.0]) == Left(stage_s=6.0, command_s=13.0, ends=0)


def test_after_a_resume_only_the_rest_counts() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.stage_started(stage_started("32k", 5))
    for _ in range(4):
        clock.now += 2.0
        pace.step_done()
    assert pace.left(step_done("32k", 8)) == Left(stage_s=2.0, command_s=2.0, ends=1)


def shown(monkeypatch: pytest.MonkeyPatch, clock: Clock, events: list[tuple[float, Event]]) -> str:
    """What is printed on no terminal when the events arrive after so many seconds each."""
    lines: list[str] = []
    monkeypatch.setattr(module.console, "print", lambda what, **how: lines.append(Text.from_markup(what).plain))
    display = TrainingDisplay(clock)
    for seconds, event in events:
        clock.now += seconds
        display(event)
    return "\n".join(lines)


def test_a_line_names_both_rates_and_says_what_its_eta_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = before(stage_started("32k"), 3594.0, "128k", "256k")
    steps: list[tuple[float, Event]] = [(8.0, step_done("32k", n)) for n in range(3)]
    text = shown(monkeypatch, Clock(), [(0.0, stage), *steps, (4.0, step_done("32k", 3)), (6.0, step_done("32k", 4))])
    assert "eta counts 128k, 256k in: 3,594 steps of this stage by the FLOPs that m1 plan counts" in text
    lines = [line for line in text.splitlines() if line.startswith("32k step")]
    assert "tok/s 64 (1,024 in the step)" in lines[0]
    assert lines[0].endswith("eta not known yet")
    assert lines[-1].startswith("32k step 5/10 ")
    assert "tok/s 75 (1,024 in the step)" in lines[-1]  # 2,560 tokens in 34 s
    assert lines[-1].endswith("eta ~4:59:55 (stage ~0:25) + 3 stage ends")


def test_the_panel_shows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, screen = Clock(), Console(file=io.StringIO(), width=120, force_terminal=True)
    monkeypatch.setattr(module, "console", screen)
    display, last = TrainingDisplay(clock), step_done("32k", 3)
    display(before(stage_started("32k"), 54.0, "128k"))
    for n in range(4):
        clock.now += 4.0
        display(step_done("32k", n))
    with screen.capture() as captured:
        screen.print(display._panel(last))
    text = Text.from_ansi(captured.get()).plain
    for part in ("128 tokens/s", "0.50 s in the step: 1,024 tokens/s", "eta ~4:00 (stage ~0:24) + 2 stage ends"):
        assert part in text


def test_a_single_stage_has_one_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[float, Event]] = [(6.0, step_done("32k", n)) for n in range(4)]
    text = shown(monkeypatch, Clock(), [(0.0, stage_started("32k")), *steps])
    assert text.endswith("eta ~0:36 + 1 stage end")
    assert "eta counts" not in text


@pytest.mark.parametrize(("step", "since"), [(0, "in 5 s: loss"), (5, "in 5 s since step 5: loss")])
def test_the_time_of_a_continued_stage_is_that_of_its_rest(
    monkeypatch: pytest.MonkeyPatch, step: int, since: str
) -> None:
    done = StageFinished(
        stage="32k",
        steps=10,
        since_step=step,
        first_loss=7.0,
        last_loss=6.1,
        seconds=5.0,
        checkpoint="step_00000010",
        ramp_progress=1.0,
    )
    assert f"stage 32k done {since}" in shown(
        monkeypatch, Clock(), [(0.0, stage_started("32k", step)), (1.0, step_done("32k", 9)), (0.0, done)]
    )


def test_what_a_later_stage_costs_follows_the_plan(tmp_path: Path) -> None:
    """Measured on an H200: 322,129 tokens/s of packed rows at 32K, 315,565 at 128K (docs/LOG.md, 2026-11-26)."""
    config = resolved(tmp_path, "700m").config
    costs, basis = step_costs(config, STAGE_NAMES, Layout(), GPUS["h200"])
    assert basis == "the times of a step that m1 plan estimates for h200"
    assert costs["128k"] / costs["32k"] == pytest.approx(322_129 / 315_565, rel=0.15)
    flops, basis = step_costs(config, ["32k", "128k"], Layout(), None)
    m, (first, second, *_) = model_with_vocab(config), stage_workloads(config)
    assert basis == "the FLOPs that m1 plan counts"
    assert set(flops) == {"32k", "128k"}
    assert flops["128k"] / flops["32k"] == pytest.approx(
        training_flops(m, second.mix_pairs).total
        * second.tokens_per_step
        / (training_flops(m, first.mix_pairs).total * first.tokens_per_step)
    )
    uneven = Layout(data=3)  # the trainer does not take it: nothing divides by zero
    assert step_costs(config, STAGE_NAMES, uneven, GPUS["h200"])[1] == "the FLOPs that m1 plan counts"


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H20-3e", "h20"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA RTX A1000", None), ("NVIDIA GH200 480GB", None), ("", None),
    ],
)  # fmt: skip
def test_the_gpu_that_a_driver_names(device: str, gpu: str | None) -> None:
    assert gpu_of_device(device) == (GPUS[gpu] if gpu else None)
