"""Learning rates and stage plans by numbers that are worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.curriculum import LrSchedule, move_ramp, plan_sft, plan_stage, previous_stage

# 21 steps: 4 of warm-up, constant until step 8, then 12 steps in which the rate falls to a sixteenth.
WHOLE = LrSchedule(peak=0.016, final=0.001, num_steps=21, warmup_share=0.2, constant_share=0.2)


def close(*values: float) -> Any:
    return pytest.approx(list(values), rel=1e-12)


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_warm_up_is_linear_and_ends_at_the_peak(shape: Any) -> None:
    lr = replace(WHOLE, shape=shape)
    assert [lr.at(step) for step in range(4)] == close(0.004, 0.008, 0.012, 0.016)


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_the_constant_part_is_the_peak_to_the_last_bit(shape: Any) -> None:
    lr = replace(WHOLE, shape=shape)
    assert [lr.at(step) for step in range(4, 9)] == [0.016] * 5
    assert lr.at(9) < 0.016


def test_exponential_decay_halves_every_quarter() -> None:
    assert [WHOLE.at(step) for step in (11, 14, 17, 20)] == close(0.008, 0.004, 0.002, 0.001)


def test_cosine_decay_is_no_line() -> None:
    """Progress 1/4, 1/3, 1/2, 2/3 and 1: (1 + cos) / 2 is 0.853..., 3/4, 1/2, 1/4 and 0."""
    lr = replace(WHOLE, shape="cosine")
    middle = 0.001 + 0.015 * (0.5 + 0.25 * 2**0.5)
    assert [lr.at(step) for step in (11, 12, 14, 16, 20)] == close(middle, 0.01225, 0.0085, 0.00475, 0.001)


@pytest.mark.parametrize("shape", ["exponential", "cosine"])
def test_steps_beyond_the_last_stay_at_the_final_rate(shape: Any) -> None:
    lr = replace(WHOLE, shape=shape)
    assert [lr.at(step) for step in (21, 26, 1000)] == close(0.001, 0.001, 0.001)


def test_without_warm_up_or_constant_part_the_first_step_is_the_peak_and_the_last_the_final_rate() -> None:
    lr = LrSchedule(peak=0.016, final=0.001, num_steps=5)
    assert [lr.at(step) for step in range(5)] == close(0.016, 0.008, 0.004, 0.002, 0.001)


@pytest.mark.parametrize(
    ("num_steps", "warmup", "constant", "expected"),
    [
        (1, 0.0, 0.0, [0.016]),
        (3, 0.0, 0.67, [0.016, 0.016, 0.016]),
        (4, 0.5, 0.5, [0.008, 0.016, 0.016, 0.016]),
        (4, 0.0, 0.5, [0.016, 0.016, 0.016, 0.001]),
        (2, 0.0, 0.0, [0.016, 0.001]),
        (4, 1.0, 0.0, [0.004, 0.008, 0.012, 0.016]),
    ],
    ids=["one step", "no step left", "fewer than none left", "one step left", "only decay", "only warm-up"],
)
def test_few_steps(num_steps: int, warmup: float, constant: float, expected: list[float]) -> None:
    lr = LrSchedule(peak=0.016, final=0.001, num_steps=num_steps, warmup_share=warmup, constant_share=constant)
    assert [lr.at(step) for step in range(num_steps)] == close(*expected)


def resolved(folder: Path, *overrides: str) -> Resolved:
    text = 'preset = "tiny"\n[curriculum]\nlength_scale = 0.001953125\n[sft]\ncontext_tokens = 32768\n'  # rows of 64 tokens
    (folder / "m1.toml").write_text(text)
    return load_config(folder / "m1.toml", overrides)


STAGE = [
    "stages.128k.tokens=21504",
    "stages.128k.global_batch_tokens=1024",
    "stages.128k.micro_batch_rows=2",
    "stages.128k.lr_peak=0.016",
    "stages.128k.lr_final=0.001",
    "stages.128k.lr_warmup_share=0.1",
    "stages.128k.lr_constant_share=0.3",
    "stages.128k.rope_base=123456.0",
]


def test_a_stage_plan_takes_everything_from_its_stage(tmp_path: Path) -> None:
    """1024 tokens a step are 4 rows of 256; a quarter of 21 steps rounds to 5."""
    plan = plan_stage(resolved(tmp_path, *STAGE, "curriculum.decay=relax"), "128k")
    assert plan.lr == LrSchedule(
        peak=0.016, final=0.001, num_steps=21, warmup_share=0.1, constant_share=0.3, shape="exponential"
    )
    assert (plan.stage, plan.starts_from, plan.context_tokens, plan.seq_len) == ("128k", "32k", 131_072, 256)
    assert (plan.global_batch_rows, plan.micro_batch_rows, plan.num_steps, plan.tokens) == (4, 2, 21, 21_504)
    assert (plan.rope_base, plan.ramp_length, plan.ramp_steps) == (123456.0, 5, 5)
    assert plan.softmax_layers == (7,)
    warmed = [0.008, 0.016]  # round(0.1 * 21) steps, then round(0.3 * 21) = 6 more than the peak itself
    assert [plan.lr.at(step) for step in range(10)] == close(*warmed, *[0.016] * 7, plan.lr.at(9))
    assert plan.lr.at(9) == pytest.approx(0.016 * (1 / 16) ** (1 / 12), rel=1e-12)


def test_ramp_length_is_a_share_of_the_steps_and_at_least_one(tmp_path: Path) -> None:
    for share, length in ((0.5, 10), (1.0, 21), (0.01, 1)):
        settings = [f"curriculum.decay_ramp_share={share}", "curriculum.decay=fixed"]
        plan = plan_stage(resolved(tmp_path, *STAGE, *settings), "128k")
        assert (plan.ramp_length, plan.ramp_steps) == (length, 0), "fixed slopes do not move"


def test_a_fine_tuning_plan_takes_a_cosine_and_its_warm_up_from_the_sft_section(tmp_path: Path) -> None:
    """7 rows twice, 2 rows (128 tokens) a step: 7 steps, of which round(0.3 * 7) warm up."""
    settings = ["sft.lr_peak=0.016", "sft.lr_final=0.001", "sft.lr_warmup_share=0.3", "sft.global_batch_tokens=128",
                "sft.epochs=2", "sft.base_stage=256k", "sft.micro_batch_rows=2", "stages.256k.rope_base=777.0",
                "curriculum.decay=relax"]  # fmt: skip
    configuration = resolved(tmp_path, *settings)
    plan = plan_sft(configuration, 7)
    assert plan.lr == LrSchedule(
        peak=0.016, final=0.001, num_steps=7, warmup_share=0.3, constant_share=0.0, shape="cosine"
    )
    assert [plan.lr.at(step) for step in (0, 1, 2, 4, 6)] == close(0.008, 0.016, 0.016, 0.0085, 0.001)
    assert (plan.stage, plan.starts_from, plan.context_tokens, plan.seq_len) == ("sft", "256k", 32_768, 64)
    assert (plan.global_batch_rows, plan.micro_batch_rows, plan.num_steps, plan.rope_base) == (2, 2, 7, 777.0)
    base = plan_stage(configuration, "256k").slopes_new
    assert (plan.slopes_old, plan.slopes_new, plan.ramp_steps, plan.softmax_layers) == (base, base, 0, (7,))


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_tokens", "batch_rows", "steps"),
    [(7, 1, 128, 2, 4), (3, 2, 1_048_576, 3, 2), (5, 1, 63, 1, 5), (10, 0.01, 256, 4, 1)],
    ids=["rounded", "a batch holds at most all rows", "a batch holds at least one row", "at least one step"],
)
def test_rows_and_steps_of_fine_tuning(
    tmp_path: Path, rows: int, epochs: float, batch_tokens: int, batch_rows: int, steps: int
) -> None:
    configuration = resolved(tmp_path, f"sft.epochs={epochs}", f"sft.global_batch_tokens={batch_tokens}")
    plan = plan_sft(configuration, rows)
    assert (plan.global_batch_rows, plan.num_steps) == (batch_rows, steps)


def test_previous_stages() -> None:
    stages = [None, "32k", "128k", "256k", "512k"]
    assert [previous_stage(stage) for stage in ("32k", "128k", "256k", "512k", "1m")] == stages


def test_a_plan_with_a_held_ramp_starts_from_other_slopes(tmp_path: Path) -> None:
    plan = plan_stage(resolved(tmp_path, *STAGE, "curriculum.decay=relax"), "128k")
    slopes = [[2 * slope for slope in row] for row in plan.slopes_new]
    moved = plan.starting_from(slopes)
    assert (moved.slopes_old, moved.slopes_new) == (slopes, plan.slopes_new)
    assert moved.slopes_at(0.5)[3] == pytest.approx([2**0.5 * slope for slope in plan.slopes_new[3]], rel=1e-12)


def test_the_ramp_moves_by_one_step_or_back_by_two() -> None:
    assert move_ramp(0.4, 10, "advance") == pytest.approx(0.5, rel=1e-12)
    assert move_ramp(0.4, 10, "hold") == 0.4
    assert move_ramp(0.4, 10, "reverse") == pytest.approx(0.2, rel=1e-12)
    assert move_ramp(0.1, 10, "reverse") == 0.0
    assert move_ramp(1.0, 10, "advance") == 1.0
    assert move_ramp(0.4, 0, "advance") == 0.4
    assert move_ramp(0.0, 1, "advance") == 1.0


def test_whole_ramps_end_at_exactly_one() -> None:
    """Ten tenths sum to a little less than one, three thirds and seven sevenths to one or a little less."""
    for steps in range(1, 50):
        progress = 0.0
        for _ in range(steps - 1):
            progress = move_ramp(progress, steps, "advance")
            assert progress < 1.0
        assert move_ramp(progress, steps, "advance") == 1.0
