"""Decay policies and the ramp between stages."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1_stages.config import STAGE_NAMES, CurriculumConfig
from m1_stages.config.load import load_config
from m1_stages.curriculum import LrSchedule, move_ramp, plan_stage, stages_of
from m1_stages.decay import half_life_tokens, is_released, policy_slopes, ramp, released_slopes
from m1_stages.errors import ConfigError

slope = st.floats(1e-6, 10.0)
pairs = st.lists(st.tuples(slope, slope), min_size=1, max_size=8)


def resolved(tmp_path: Path, *overrides: str):
    path = tmp_path / "m1.toml"
    path.write_text('preset = "tiny"')
    return load_config(path, overrides)


def test_released_slopes_are_minimaxs() -> None:
    slopes = released_slopes(80, 64)
    assert slopes[0][0] == pytest.approx(2 ** (-1 / 8) * (1 + 1e-5), rel=1e-12)
    assert slopes[0][63] == pytest.approx(2.0**-8 * (1 + 1e-5), rel=1e-12)
    assert slopes[78][63] == pytest.approx(2.0**-8 * (1 - 78 / (79 + 1e-5) + 1e-5), rel=1e-12)
    assert half_life_tokens(slopes[0][63]) == pytest.approx(177, abs=1)
    assert half_life_tokens(slopes[78][63]) == pytest.approx(14_007, abs=20)


def test_relax_forgets_faster_in_short_stages_and_ends_exactly_on_the_released(tmp_path: Path) -> None:
    r = resolved(tmp_path, "curriculum.decay=relax", "curriculum.relax_exponent=0.5")
    plans = [plan_stage(r, stage) for stage in STAGE_NAMES]
    released = released_slopes(8, 4)
    assert plans[-1].slopes_new == released
    assert is_released(plans[-1].slopes_new, r.config.model)
    assert not is_released(plans[-2].slopes_new, r.config.model)
    for plan, ratio in zip(plans, (32, 8, 4, 2, 1), strict=True):
        assert plan.slopes_new[3][2] == pytest.approx(released[3][2] * ratio**0.5, rel=1e-12)
    for before, after in itertools.pairwise(plans):
        assert after.slopes_old == before.slopes_new


def test_stretch_takes_one_exponent_or_one_per_layer(tmp_path: Path) -> None:
    model = resolved(tmp_path).config.model
    exponents = tuple(0.1 * layer for layer in range(8))
    slopes = policy_slopes(CurriculumConfig(decay="stretch", stretch_exponent=exponents), model, 1_048_576)
    released = released_slopes(8, 4)
    for layer in range(8):
        assert slopes[layer][1] == pytest.approx(released[layer][1] * 32 ** -exponents[layer], rel=1e-12)
    assert policy_slopes(CurriculumConfig(decay="stretch"), model, 32_768) == released


def test_fixed_never_ramps(tmp_path: Path) -> None:
    r = resolved(tmp_path, "curriculum.decay=fixed")
    assert all(plan_stage(r, s).ramp_steps == 0 and is_released(plan_stage(r, s).slopes_new, r.config.model)
               for s in STAGE_NAMES)  # fmt: skip


def test_custom_table(tmp_path: Path) -> None:
    table = {stage: [[0.1 * (h + 1) + layer for h in range(4)] for layer in range(8)] for stage in STAGE_NAMES}
    (tmp_path / "decay.json").write_text(json.dumps(table))
    r = resolved(tmp_path, "curriculum.decay=custom", "curriculum.custom_table=decay.json")
    assert plan_stage(r, "256k").slopes_new == table["256k"]
    table["256k"][3] = [0.1, 0.2, 0.0, 0.3]
    (tmp_path / "decay.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="slopes > 0 for 256k"):
        plan_stage(r, "256k")


@given(pairs, st.floats(0.0, 1.0))
def test_ramp_stays_between_its_ends_and_is_log_linear(ends: list[tuple[float, float]], progress: float) -> None:
    old, new = [[a for a, _ in ends]], [[b for _, b in ends]]
    for (a, b), value in zip(ends, ramp(old, new, progress)[0], strict=True):
        assert min(a, b) * (1 - 1e-12) <= value <= max(a, b) * (1 + 1e-12)
        assert math.log(value) == pytest.approx((1 - progress) * math.log(a) + progress * math.log(b), abs=1e-9)
    assert ramp(old, new, 0.0) == old
    assert ramp(old, new, 1.0) == new


@given(st.integers(0, 500), st.integers(1, 600))
def test_ramp_progress_is_monotone_and_ends(ramp_steps: int, steps: int) -> None:
    progress = [0.0]
    for _ in range(steps):
        progress.append(move_ramp(progress[-1], ramp_steps, "advance"))
    assert all(a <= b for a, b in itertools.pairwise(progress))
    if ramp_steps == 0:
        assert progress[-1] == 0.0
    elif steps > ramp_steps:
        assert progress[-1] == 1.0
    assert move_ramp(0.4, 10, "hold") == 0.4
    assert move_ramp(0.4, 10, "reverse") == pytest.approx(0.2)
    assert move_ramp(0.1, 10, "reverse") == 0.0


def test_learning_rate_of_the_published_first_stage() -> None:
    lr = LrSchedule(peak=8e-5, final=8e-6, num_steps=301, constant_share=0.3333)
    assert {lr.at(s) for s in range(100)} == {8e-5}
    assert lr.at(300) == pytest.approx(8e-6, rel=1e-12)
    assert lr.at(200) == pytest.approx(8e-5 * 0.1**0.5, rel=1e-9)


@given(st.integers(1, 400), st.floats(0, 0.5), st.floats(0, 0.5), st.sampled_from(["exponential", "cosine"]))
def test_learning_rate_stays_in_range_and_never_rises_after_warmup(n: int, w: float, c: float, shape: str) -> None:
    lr = LrSchedule(peak=1e-3, final=1e-4, num_steps=n, warmup_share=w, constant_share=c, shape=shape)  # type: ignore[arg-type]
    values = [lr.at(s) for s in range(n)]
    after = values[round(w * n) :]
    assert all(0 < v <= 1e-3 for v in values)
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(after))


def test_stage_selection() -> None:
    assert stages_of("all") == list(STAGE_NAMES)
    assert stages_of("256k") == ["256k"]
    with pytest.raises(ConfigError, match="there is no stage '64k'"):
        stages_of("64k")
