"""The guard's bands at their edges: steps without noise, so that median and spread are known exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from m1_stages.config import GuardConfig
from m1_stages.guard import FIRST_STEPS_FACTOR, Guard, GuardState, Observation

CONFIG = GuardConfig(min_steps=4, window=8)
LAYERS = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 9.0]
"""Of seven layers two are early and two are late; the early ones have norm 1, the late ones 6 (geometric mean of 4 and 9)."""


def step(number: int = 0, *, loss: float = 2.0, norm: float = 1.0, layers: list[float] = LAYERS) -> Observation:
    return Observation(step=number, loss=loss, grad_norm=norm, layer_grad_norms=layers)


def after(steps: int, guess: float = math.inf, **changes: Any) -> Guard:
    """A guard that has seen so many equal steps; their spread is the floor, 0.02 of the logarithm."""
    g = Guard(dataclasses.replace(CONFIG, **changes), GuardState(), guess)
    for number in range(steps):
        assert g.judge(step(number)).action == "apply"
    return g


def test_series_are_logarithms_of_the_accepted_steps() -> None:
    g = after(1)
    assert g.state.series["loss"] == [pytest.approx(math.log(2.0))]
    assert g.state.series["layer 6"] == [pytest.approx(math.log(9.0))]
    assert g.state.series["early/late"] == [pytest.approx(math.log(1 / 6))]
    assert set(g.state.series) == {"loss", "grad_norm", "early/late", *(f"layer {n}" for n in range(7))}


def test_a_guard_begins_with_nothing() -> None:
    assert dataclasses.asdict(GuardState()) == {
        "series": {},
        "skipped": [],
        "consecutive": 0,
        "in_band_steps": 0,
        "before": {},
    }
    assert [Guard(CONFIG, g).judge(step()).ramp for g in [GuardState()] * 2] == ["hold", "advance"]


def test_one_or_two_layers_have_an_early_and_a_late_one() -> None:
    g = Guard(CONFIG, GuardState())
    g.judge(step(layers=[2.0, 8.0]))
    assert g.state.series["early/late"] == [pytest.approx(math.log(1 / 4))]
    assert g.state.skipped == []


def test_the_window_holds_the_newest_steps() -> None:
    g = after(7)
    for number, norm in ((7, 1.1), (8, 1.2), (9, 1.3)):
        g.judge(step(number, norm=norm))
    assert g.state.series["grad_norm"] == pytest.approx([0.0] * 5 + [math.log(x) for x in (1.1, 1.2, 1.3)])


@pytest.mark.parametrize(("norm", "action"), [(4.99, "apply"), (5.01, "skip")])
def test_a_norm_five_times_its_median_is_a_spike(norm: float, action: str) -> None:
    assert after(4).judge(step(4, norm=norm)).action == action


@pytest.mark.parametrize(("loss", "action"), [(5.99, "apply"), (6.01, "skip")])
def test_a_loss_three_times_its_median_is_a_spike(loss: float, action: str) -> None:
    assert after(4).judge(step(4, loss=loss)).action == action


@pytest.mark.parametrize(
    ("factor", "action"), [(4.99, "apply"), (5.01, "skip"), (1 / 4.99, "apply"), (1 / 5.01, "skip")]
)
def test_early_over_late_layers_may_leave_its_band_to_both_sides(factor: float, action: str) -> None:
    layers = [factor * norm for norm in LAYERS[:2]] + LAYERS[2:]
    verdict = after(4).judge(step(4, layers=layers))
    assert verdict.action == action
    assert verdict.z == pytest.approx(abs(math.log(factor)) / 0.02)


def test_a_spike_is_six_robust_deviations_too() -> None:
    """Norms of e^-1, 1 and e: the median deviation is 1, so 6 deviations are e^8.9; 5 times the median is much less."""
    g = Guard(CONFIG, GuardState())
    for number, log_norm in enumerate((-1.0, 1.0, -1.0, 1.0, 0.0)):
        g.judge(step(number, norm=math.exp(log_norm)))
    assert (verdict := g.judge(step(5, norm=math.exp(8.8)))).action == "apply"
    assert (verdict.ramp, verdict.z, verdict.median) == ("hold", pytest.approx(8.8 / 1.4826), pytest.approx(1.0))
    g.state.series = {name: past[:5] for name, past in g.state.series.items()}
    assert g.judge(step(5, norm=math.exp(9.0))).action == "skip"


@pytest.mark.parametrize(("norm", "ramp"), [(1.49, "advance"), (1.51, "hold")])
def test_a_norm_one_and_a_half_times_its_median_holds_the_ramp(norm: float, ramp: str) -> None:
    verdict = after(4).judge(step(4, norm=norm))
    assert (verdict.action, verdict.ramp, bool(verdict.reason)) == ("apply", ramp, ramp == "hold")


def test_a_warning_is_four_robust_deviations_too() -> None:
    g = Guard(CONFIG, GuardState())
    for number, log_norm in enumerate((-0.2, 0.2, -0.2, 0.2, 0.0)):
        g.judge(step(number, norm=math.exp(log_norm)))
    assert g.judge(step(5, norm=math.exp(1.18))).ramp == "advance", "3.98 deviations, 3.3 times the median"
    g.state.series = {name: past[:5] for name, past in g.state.series.items()}
    assert g.judge(step(5, norm=math.exp(1.19))).ramp == "hold"


def test_a_layer_alone_is_no_spike_however_far_out() -> None:
    layers = [*LAYERS[:3], 1e6, *LAYERS[4:]]
    verdict = after(4).judge(step(4, layers=layers))
    assert (verdict.action, verdict.ramp, verdict.series) == ("apply", "hold", "layer 3")
    assert (verdict.value, verdict.median, verdict.reason) == (1e6, pytest.approx(2.0), "outside of its band")


def test_the_furthest_of_several_spikes_is_named() -> None:
    verdict = after(4).judge(step(4, loss=20.0, norm=100.0))
    assert (verdict.series, verdict.value, verdict.median) == ("grad_norm", 100.0, pytest.approx(1.0))
    assert verdict.z == pytest.approx(math.log(100.0) / 0.02)
    verdict = after(4).judge(step(4, loss=200.0, norm=10.0))
    assert (verdict.series, verdict.reason) == ("loss", "spike")


def test_the_furthest_of_several_warnings_is_named() -> None:
    assert after(4).judge(step(4, loss=5.0, norm=2.0)).series == "loss"
    assert after(4).judge(step(4, loss=4.0, norm=4.5)).series == "grad_norm"


def test_steps_are_judged_by_their_own_past_from_min_steps_on() -> None:
    assert after(3).judge(step(3, norm=100.0)).action == "apply"
    assert after(4).judge(step(4, norm=100.0)).action == "skip"


@pytest.mark.parametrize(
    ("norm", "action", "ramp"),
    [(4.99, "apply", "advance"), (5.01, "apply", "hold"), (19.99, "apply", "hold"), (20.01, "skip", "reverse")],
)
def test_the_first_steps_of_a_stage_are_measured_by_the_stage_before(norm: float, action: str, ramp: str) -> None:
    assert FIRST_STEPS_FACTOR == 4.0
    g = Guard(CONFIG, after(8).state.at_stage_change())
    verdict = g.judge(step(8, norm=norm))
    assert (verdict.action, verdict.ramp, verdict.z) == (action, ramp, 0.0)
    assert Guard(CONFIG, after(8).state.at_stage_change()).judge(step(8, loss=60.0)).action == "apply", "norms only"


def test_the_stage_before_is_a_median_and_a_skip_row_ends_with_it() -> None:
    state = GuardState(
        series={"loss": [1.0, 2.0, 9.0]}, before={"loss": 5.0}, consecutive=2, in_band_steps=3, skipped=[7]
    )
    changed = state.at_stage_change()
    assert (changed.before, changed.series, changed.consecutive) == ({"loss": 2.0}, {}, 0)
    assert (changed.in_band_steps, changed.skipped) == (3, [7]), "these go on"


def test_a_loss_worse_than_guessing_counts_once_something_is_learned() -> None:
    """Learned is a median below 0.8 of the loss of guessing, here 2 of more or less than 2.5."""
    assert after(4, guess=2.49).judge(step(4, loss=2.6)).action == "apply"
    verdict = after(4, guess=2.51).judge(step(4, loss=2.6))
    assert (verdict.action, verdict.series, verdict.reason) == ("skip", "loss", "spike, worse than guessing (2.51)")
    assert after(4, guess=2.51).judge(step(4, loss=2.51)).action == "apply", "not worse"
    assert after(4, guess=2.51).judge(step(4, norm=3.0)).action == "apply", "a norm is no loss"
    assert after(4, guess=2.51).judge(step(4, norm=9.0)).reason == "spike"


def test_a_step_that_is_not_finite_is_named() -> None:
    verdict = after(4, on_nonfinite="skip").judge(step(4, loss=math.nan))
    assert (verdict.action, verdict.ramp, verdict.series, verdict.median) == ("skip", "reverse", "loss", 1.0)
    assert verdict.reason == "not finite"
    assert (verdict.value, verdict.z) == (math.inf, math.inf)
    verdict = after(4).judge(step(4, norm=math.inf))
    assert (verdict.action, verdict.ramp, verdict.series) == ("stop", "hold", "grad_norm")


def test_switched_off() -> None:
    g = after(0, enabled=False)
    assert (g.judge(step()).ramp, g.judge(step()).reason, g.state.series) == ("advance", "", {})
    verdict = g.judge(step(loss=math.nan))
    assert (verdict.action, verdict.reason) == ("stop", "not finite")


def test_spikes_that_are_applied_as_configured_are_in_the_window() -> None:
    g = after(4, on_spike="apply")
    verdict = g.judge(step(4, norm=100.0))
    assert (verdict.action, verdict.ramp, verdict.reason) == ("apply", "reverse", "spike, applied as configured")
    assert g.state.series["grad_norm"][-1] == pytest.approx(math.log(100.0))
    assert g.state.skipped == []
    stopped = after(4, on_spike="stop").judge(step(4, norm=100.0))
    assert (stopped.action, stopped.ramp, stopped.reason) == ("stop", "hold", "spike")


def test_spikes_without_an_accepted_step_between_them() -> None:
    g = after(4, skip_budget=9)
    verdicts = [g.judge(step(number, norm=100.0)) for number in (4, 5, 6)]
    assert [v.action for v in verdicts] == ["skip", "skip", "roll_back"]
    assert (verdicts[2].ramp, verdicts[2].reason) == ("hold", "spike, 3 consecutive: more than 2")
    assert (g.state.consecutive, g.state.skipped) == (3, [4, 5, 6])
    g = after(4, skip_budget=9)
    for number in range(4, 12, 2):
        assert g.judge(step(number, norm=100.0)).action == "skip", "an accepted step begins the count anew"
        assert g.judge(step(number + 1)).action == "apply"
        assert g.state.consecutive == 0


def test_the_budget_is_for_so_many_steps_before_this_one() -> None:
    for last, action, skipped in ((103, "roll_back", [4, 50, 103]), (104, "skip", [50, 104])):
        g = after(4, skip_budget=2, budget_steps=100)
        for number in (4, 50):
            assert g.judge(step(number, norm=100.0)).action == "skip"
            g.judge(step(number + 1))
        verdict = g.judge(step(last, norm=100.0))
        assert (verdict.action, g.state.skipped) == (action, skipped)
    g = after(4, skip_budget=0, budget_steps=2000)
    assert g.judge(step(4, norm=100.0)).reason == "spike, more than 0 skipped in 2,000 steps"


def test_a_held_ramp_moves_again_after_steps_in_the_band() -> None:
    for spike in ({"norm": 2.0}, {"norm": 100.0}):
        g = after(6)
        assert g.judge(step(6)).ramp == "advance"
        assert g.judge(step(7, **spike)).ramp in ("hold", "reverse")
        assert [g.judge(step(number)).ramp for number in (8, 9, 10)] == ["hold", "advance", "advance"]
