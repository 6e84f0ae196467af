"""The guard's verdicts on made-up steps."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1_stages.config import GuardConfig
from m1_stages.guard import Guard, GuardState, Observation, Verdict

LAYERS = 8
CONFIG = GuardConfig(window=32, min_steps=8)


def guard(**changes: Any) -> Guard:
    return Guard(dataclasses.replace(CONFIG, **changes), GuardState())


def seen(step: int, *, loss: float = 3.0, norm: float = 1.0, layers: dict[int, float] | None = None) -> Observation:
    """A step with 2 % of noise, the same for the same number."""
    noise = random.Random(step)
    norms = [norm * (layers or {}).get(n, 1.0) * math.exp(0.02 * noise.gauss(0, 1)) / 3 for n in range(LAYERS)]
    return Observation(
        step=step, loss=loss * math.exp(0.01 * noise.gauss(0, 1)), grad_norm=norm, layer_grad_norms=norms
    )


def calm(g: Guard, steps: int = 20) -> int:
    for step in range(steps):
        verdict = g.judge(seen(step))
        assert (verdict.action, verdict.reason) == ("apply", "")
    return steps


def test_quiet_steps_pass_and_the_ramp_moves() -> None:
    g = guard(in_band_steps=3)
    assert [g.judge(seen(step)).ramp for step in range(5)] == ["hold", "hold", "advance", "advance", "advance"]
    assert len(g.state.series["layer 3"]) == 5


def test_nothing_is_judged_before_enough_steps() -> None:
    g = guard()
    for step in range(7):
        g.judge(seen(step))
    assert g.judge(seen(7, loss=300.0)).action == "apply"


@pytest.mark.parametrize(
    ("spike", "series"),
    [({"loss": 300.0}, "loss"), ({"norm": 100.0}, "grad_norm"), ({"layers": {0: 400.0, 1: 400.0}}, "early/late"),
     ({"layers": {6: 400.0, 7: 400.0}}, "early/late")],
)  # fmt: skip
def test_a_spike_is_skipped_and_reverses_the_ramp(spike: dict[str, Any], series: str) -> None:
    g = guard()
    step = calm(g)
    before = json.dumps(g.state.series)
    verdict = g.judge(seen(step, **spike))
    assert (verdict.action, verdict.ramp, verdict.series) == ("skip", "reverse", series)
    assert verdict.z > CONFIG.spike_z
    assert json.dumps(g.state.series) == before, "a spike must not widen the band"
    assert g.state.skipped == [step]
    after = g.judge(seen(step + 1))
    assert (after.action, after.ramp) == ("apply", "hold")
    assert g.judge(seen(step + 2)).ramp == "advance"


def test_falling_numbers_are_no_spikes() -> None:
    g = guard()
    step = calm(g)
    assert g.judge(seen(step, loss=0.3, norm=0.01)).action == "apply"


def test_one_layer_out_of_its_band_holds_the_ramp() -> None:
    g = guard()
    step = calm(g)
    verdict = g.judge(seen(step, layers={5: 2.5}))
    assert (verdict.action, verdict.ramp, verdict.series) == ("apply", "hold", "layer 5")
    assert verdict.value / verdict.median == pytest.approx(2.5, rel=0.1)


def test_a_spike_needs_both_distance_and_factor() -> None:
    g = guard()
    step = calm(g)
    verdict = g.judge(seen(step, norm=3.0))  # 50 deviations, but not 4 times the median
    assert (verdict.action, verdict.ramp) == ("apply", "hold")


def test_consecutive_spikes_roll_back() -> None:
    g = guard(skip_budget=10, max_consecutive_skips=2)
    step = calm(g)
    assert [g.judge(seen(step + n, norm=50.0)).action for n in range(3)] == ["skip", "skip", "roll_back"]


def test_budget_counts_within_its_steps_and_survives_a_checkpoint() -> None:
    g = guard(skip_budget=2, budget_steps=100)
    step = calm(g)
    actions = []
    for n in (0, 50, 90):
        state = GuardState(**json.loads(json.dumps(dataclasses.asdict(g.state))))
        g = Guard(g.config, state)
        actions.append(g.judge(seen(step + n, norm=50.0)).action)
        g.judge(seen(step + n + 1))
    assert actions == ["skip", "skip", "roll_back"]
    g = guard(skip_budget=2, budget_steps=30)
    calm(g)
    actions = []
    for n in (0, 50, 90):
        actions.append(g.judge(seen(step + n, norm=50.0)).action)
        g.judge(seen(step + n + 1))
    assert actions == ["skip", "skip", "skip"], "older skips left the budget"


@pytest.mark.parametrize("bad", [{"loss": math.inf}, {"norm": math.inf}, {"loss": math.nan}])
@pytest.mark.parametrize(("policy", "action"), [("stop", "stop"), ("skip", "skip")])
def test_numbers_that_are_not_finite(bad: dict[str, float], policy: str, action: str) -> None:
    g = guard(on_nonfinite=policy)
    verdict = g.judge(seen(0, **bad))
    assert (verdict.action, verdict.reason.split(",")[0]) == (action, "not finite")
    assert not g.state.series


def test_policies() -> None:
    for policy, action in (("stop", "stop"), ("apply", "apply")):
        g = guard(on_spike=policy)
        step = calm(g)
        verdict = g.judge(seen(step, norm=50.0))
        assert verdict.action == action
        assert (verdict.ramp == "reverse") == (policy == "apply")


def test_switched_off_only_numbers_that_are_not_finite_stop() -> None:
    g = guard(enabled=False)
    calm(g)
    assert g.judge(seen(20, norm=1e9)) == Verdict(action="apply", ramp="advance")
    assert g.judge(seen(21, loss=math.inf)).action == "stop"


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=30, max_size=80), st.integers(1, 29))
def test_cut_and_continued_judges_as_uncut(norms: list[float], cut: int) -> None:
    whole, first = guard(), guard()
    expected = [whole.judge(seen(n, norm=x)) for n, x in enumerate(norms)]
    verdicts = [first.judge(seen(n, norm=x)) for n, x in enumerate(norms[:cut])]
    second = Guard(CONFIG, GuardState(**json.loads(json.dumps(dataclasses.asdict(first.state)))))
    verdicts += [second.judge(seen(n + cut, norm=x)) for n, x in enumerate(norms[cut:])]
    assert verdicts == expected
    assert second.state == whole.state
    assert all(len(s) <= CONFIG.window for s in whole.state.series.values())


def test_another_stage_has_another_level_and_spread() -> None:
    """Fewer, longer rows of other text: losses and norms a few times those before are no spikes, an explosion is."""
    g = guard(min_steps=8)
    step = calm(g, 60)
    state = g.state.at_stage_change()
    assert state.series == {}
    assert set(state.before) == {"loss", "grad_norm", "early/late", *(f"layer {n}" for n in range(LAYERS))}
    following = Guard(g.config, GuardState(**json.loads(json.dumps(dataclasses.asdict(state)))))
    assert following.judge(seen(step, loss=7.0, norm=4.0)).ramp == "advance"
    held = following.judge(seen(step + 1, loss=7.0, norm=7.0))
    assert (held.action, held.ramp, held.series) == ("apply", "hold", "grad_norm")
    exploded = following.judge(seen(step + 2, norm=25.0))
    assert (exploded.action, exploded.ramp, round(exploded.median)) == ("skip", "reverse", 1)
    for n in range(3, 20):
        assert following.judge(seen(step + n, loss=7.0 if n % 3 else 3.0, norm=4.0 if n % 2 else 1.0)).action == "apply"
    assert following.judge(seen(step + 20, loss=60.0, norm=4.0)).action == "skip", "the stage's own past counts by now"


def test_a_loss_worse_than_guessing_is_a_spike_in_the_first_steps_of_a_stage_too() -> None:
    guess = math.log(2048)
    g = Guard(CONFIG, GuardState(), guess)
    for step in range(20):
        assert g.judge(seen(step, loss=1.01 * guess)).action == "apply", "nothing is learned yet"
    for step in range(20, 60):
        assert g.judge(seen(step, loss=5.0)).action == "apply"
    following = Guard(CONFIG, g.state.at_stage_change(), guess)
    assert following.judge(seen(60, loss=0.97 * guess)).action == "apply"
    bad = following.judge(seen(61, loss=1.05 * guess))
    assert (bad.action, bad.ramp, bad.series, round(bad.median)) == ("skip", "reverse", "loss", 5)
    assert bad.reason == "spike, worse than guessing (7.62)"
    assert Guard(CONFIG, g.state.at_stage_change()).judge(seen(61, loss=1.05 * guess)).action == "apply", "size unknown"


def test_a_stage_too_short_to_have_a_past_hands_on_the_one_before() -> None:
    state = GuardState(before={"grad_norm": 0.5})
    assert state.at_stage_change().before == {"grad_norm": 0.5}
