"""The gradient guard: what a step's numbers say, and what is done about them. Plain Python, no torch.

Every rank sees the same numbers and the same state, so every rank reaches the same verdict. Nothing here looks at a clock or
at random numbers: a run that is cut and continued judges as one that was not.

Each series (loss, global gradient norm, norm of every layer, early over late layers) is compared with its own recent past:
``z = (log x - median) / max(1.4826 MAD, floor)`` over a window of accepted steps, so a few outliers do not widen the band. The
first steps of a stage have no such past: there only the global norm is judged, by its factor over the stage before. A loss
above that of guessing uniformly is a spike at any time, once the model has learned something: no text does that, random tokens
do. Source of the rule's shape: OLMo skips steps beyond 6 standard deviations of 128 steps; the robust form and the per-layer
bands are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from m1_stages.config import GuardConfig

Action = Literal["apply", "skip", "roll_back", "stop"]
Ramp = Literal["advance", "hold", "reverse"]

FIRST_STEPS_FACTOR = 4.0
"""In the first steps of a stage a norm must be so many times ``norm_factor`` times the last stage's median to be a spike."""
_LEARNED = 0.8
"""A model has learned something when its median loss is less than this share of the loss of guessing."""
_FORMER_FIELDS = {"in_a_row": "consecutive", "calm": "in_band_steps"}
_MAD_TO_SIGMA = 1.4826
_SCALE_FLOOR = 0.02
"""Smallest scale of a series' logarithm: steps that differ by less than 2 % are equal, however steady the past was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What a step measured, the same on every rank."""

    step: int
    """Step of the whole run."""
    loss: float
    grad_norm: float
    layer_grad_norms: Sequence[float]

    @property
    def finite(self) -> bool:
        """Whether an update would be finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to do with a step, and why."""

    action: Action
    ramp: Ramp
    reason: str = ""
    """Empty when nothing was noticed."""
    series: str = ""
    """``loss``, ``grad_norm``, ``layer 3`` or ``early/late``: the one that is furthest out."""
    value: float = 0.0
    median: float = 0.0
    """Median of the window."""
    z: float = 0.0


@dataclass(kw_only=True, slots=True)
class GuardState:
    """What the guard remembers: plain values, in every checkpoint."""

    series: dict[str, list[float]] = field(default_factory=dict)
    """Logarithms of accepted steps, oldest first."""
    skipped: list[int] = field(default_factory=list)
    """Global steps whose update was dropped, within the budget's window."""
    consecutive: int = 0
    """Spikes without an accepted step between them."""
    in_band_steps: int = 0
    """Steps in the band since the ramp was last held or reversed."""
    before: dict[str, float] = field(default_factory=dict)
    """Medians of the logarithms of the stage before."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GuardState:
        """Rebuild a state from its fields, also under the names that version 0.1 wrote."""
        return cls(**{_FORMER_FIELDS.get(name, name): value for name, value in values.items()})

    def at_stage_change(self) -> GuardState:
        """Return what the next stage starts with.

        The next stage reads other data, in fewer and longer rows, so neither the level nor the spread of the last stage's
        numbers is its own. Only the medians stay, to tell an explosion in its first steps.
        """
        medians = {name: median(past) for name, past in self.series.items()}
        return replace(self, series={}, before=medians or self.before, consecutive=0)

    def for_other_parameters(self) -> GuardState:
        """Return what is left when other parameters are trained from here on: the loss; their gradients have other norms."""
        series = {name: past for name, past in self.series.items() if name == "loss"}
        return replace(self, series=series, before={name: x for name, x in self.before.items() if name == "loss"})


class Guard:
    """Judges steps one after the other; ``state`` is all it remembers.

    Args:
        guess_loss: loss of guessing uniformly, the logarithm of the vocabulary's size, in nats.
    """

    def __init__(self, config: GuardConfig, state: GuardState, guess_loss: float = math.inf) -> None:
        self.config, self.state, self.guess_loss = config, state, guess_loss

    def judge(self, seen: Observation) -> Verdict:
        """Judge a step and take it into the state."""
        if not self.config.enabled:
            return Verdict(action="apply" if seen.finite else "stop", ramp="advance", reason=_not_finite(seen))
        if not seen.finite:
            return self._drop(
                seen, _Distance("loss" if not math.isfinite(seen.loss) else "grad_norm", math.inf, 0.0, math.inf)
            )
        values = _series(seen)
        distances = [self._distance(name, value) for name, value in values.items()]
        known = len(self.state.series.get("loss", [])) >= self.config.min_steps
        spikes = [
            d for d in distances if (self._is_spike(d) if known else self._explodes(d)) or self._worse_than_guessing(d)
        ]
        if spikes:
            return self._drop(seen, max(spikes, key=lambda d: d.z))
        self._accept(values)
        self.state.consecutive = 0
        if warnings := [d for d in distances if (self._is_warning(d) if known else self._jumps(d))]:
            self.state.in_band_steps = 0
            return _verdict("apply", "hold", max(warnings, key=lambda d: d.z), "outside of its band")
        self.state.in_band_steps += 1
        return Verdict(
            action="apply", ramp="advance" if self.state.in_band_steps >= self.config.in_band_steps else "hold"
        )

    def _drop(self, seen: Observation, why: _Distance) -> Verdict:
        c, state = self.config, self.state
        what = "spike" if math.isfinite(why.value) else "not finite"
        if what == "spike" and self._worse_than_guessing(why):
            what = f"spike, worse than guessing ({self.guess_loss:.2f})"
        policy = c.on_spike if math.isfinite(why.value) else c.on_nonfinite
        state.in_band_steps = 0
        if policy == "apply":
            self._accept(_series(seen))
            return _verdict("apply", "reverse", why, f"{what}, applied as configured")
        if policy == "stop":
            return _verdict("stop", "hold", why, what)
        state.skipped = [step for step in state.skipped if step > seen.step - c.budget_steps] + [seen.step]
        state.consecutive += 1
        if state.consecutive > c.max_consecutive_skips:
            return _verdict(
                "roll_back",
                "hold",
                why,
                f"{what}, {state.consecutive} consecutive: more than {c.max_consecutive_skips}",
            )
        if len(state.skipped) > c.skip_budget:
            left = f"more than {c.skip_budget} skipped in {c.budget_steps:,} steps"
            return _verdict("roll_back", "hold", why, f"{what}, {left}")
        return _verdict("skip", "reverse", why, what)

    def _distance(self, name: str, value: float) -> _Distance:
        past = self.state.series.get(name, [])
        if len(past) < self.config.min_steps:
            return _Distance(name, value, self.state.before.get(name, _log(value)), 0.0)
        middle = median(past)
        scale = max(_MAD_TO_SIGMA * median(abs(x - middle) for x in past), _SCALE_FLOOR)
        away = _log(value) - middle
        if name == "early/late":
            away = abs(away)
        return _Distance(name, value, middle, away / scale)

    def _is_spike(self, d: _Distance) -> bool:
        if d.name.startswith("layer"):
            return False  # one layer alone holds the ramp; an update is dropped for what the whole model does
        factor = self.config.loss_factor if d.name == "loss" else self.config.norm_factor
        return d.z > self.config.spike_z and abs(d.away) > math.log(factor)

    def _is_warning(self, d: _Distance) -> bool:
        return d.z > self.config.warn_z and abs(d.away) > math.log(self.config.warn_factor)

    def _explodes(self, d: _Distance) -> bool:
        return d.name == "grad_norm" and d.away > math.log(FIRST_STEPS_FACTOR * self.config.norm_factor)

    def _worse_than_guessing(self, d: _Distance) -> bool:
        return d.name == "loss" and d.value > self.guess_loss and d.middle < _log(_LEARNED * self.guess_loss)

    def _jumps(self, d: _Distance) -> bool:
        return d.name == "grad_norm" and d.away > math.log(self.config.norm_factor)

    def _accept(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            past = self.state.series.setdefault(name, [])
            past.append(_log(value))
            del past[: -self.config.window]


@dataclass(frozen=True, slots=True)
class _Distance:
    name: str
    value: float
    middle: float
    """Median of the logarithms."""
    z: float

    @property
    def away(self) -> float:
        return _log(self.value) - self.middle


def _series(seen: Observation) -> dict[str, float]:
    norms = list(seen.layer_grad_norms)
    third = max(1, len(norms) // 3)
    early, late = (math.exp(sum(map(_log, part)) / third) for part in (norms[:third], norms[-third:]))
    layers = {f"layer {n}": norm for n, norm in enumerate(norms)}
    return {"loss": seen.loss, "grad_norm": seen.grad_norm, **layers, "early/late": early / late}


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


def _not_finite(seen: Observation) -> str:
    return "" if seen.finite else "not finite"


def _verdict(action: Action, ramp: Ramp, why: _Distance, reason: str) -> Verdict:
    return Verdict(
        action=action,
        ramp=ramp,
        reason=reason,
        series=why.name,
        value=why.value,
        median=math.exp(why.middle),
        z=why.z,
    )
