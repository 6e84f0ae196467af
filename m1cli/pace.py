"""Measures by the clock how fast a run trains, estimates how long its command still takes, and says where the time went."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from m1_stages.events import StageStarted, StepDone
from m1_stages.plan.run_measurements import WARM_UP_STEPS

_RECENT_STEPS = 20
_MEAN_STEPS = 1000
"""Steps of a mean that has periodic saves in it as often as they come."""

_PHASES = {
    "train": "in steps",
    "save": "saving",
    "evaluate": "evaluating",
    "build": "building the model",
    "load": "loading checkpoints",
    "data": "reading data",
    "start": "starting up",
    "join": "joining ranks",
}
_LEAST_SHARE = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """An estimate of the seconds that are left."""

    stage_s: float
    """Until the last step of the stage."""
    command_s: float
    """Until the command ends; without what follows the last step of a stage (its save and evaluation) until that was measured."""
    ends: int
    """Ends of stages that ``command_s`` lacks, because none was measured yet."""


class Pace:
    """The pace of a command, from the moments at which its events arrive.

    The time of a step is that from the step before to this one, so it has everything in it: saves, reading, waiting. Saves and
    evaluation after the last step of a stage are measured by themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: list[float] = []
        self._stage: StageStarted | None = None
        self._steps = 0
        self._last = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._warm: deque[float] = deque(maxlen=_MEAN_STEPS)

    def stage_started(self, event: StageStarted) -> None:
        """Begin to measure a stage; what passed since the last step belongs to the end of the stage before."""
        now = self._clock()
        if self._steps:
            self._ends.append(now - self._last)
        self._stage, self._steps, self._last = event, 0, now
        self._recent.clear()
        self._warm.clear()

    def step_done(self) -> None:
        """Measure a step of the stage that started last."""
        now = self._clock()
        self._steps += 1
        self._recent.append(now - self._last)
        if self._steps > WARM_UP_STEPS:
            self._warm.append(now - self._last)
        self._last = now

    def tokens_per_s(self) -> float:
        """Return the tokens per second of the last 20 steps by the clock, 0 before the first step."""
        assert self._stage is not None
        seconds = sum(self._recent)
        tokens = len(self._recent) * self._stage.global_batch_rows * self._stage.seq_len
        return tokens / seconds if seconds else 0.0

    def left(self, step: StepDone) -> Left | None:
        """Estimate what is left after ``step``; None while only warm-up steps were made in this stage."""
        if not self._warm:
            return None
        assert self._stage is not None
        later = self._stage.later
        steps_left = self._stage.num_steps - step.step - 1
        seconds_per_step = sum(self._warm) / len(self._warm)
        ends = 1 + (len(later.stages) if later else 0)
        end_s = sum(self._ends) / len(self._ends) if self._ends else 0.0
        return Left(
            stage_s=steps_left * seconds_per_step,
            command_s=(steps_left + (later.cost_in_steps if later else 0.0)) * seconds_per_step + ends * end_s,
            ends=0 if self._ends else ends,
        )


def wall_time(seconds: Mapping[str, float]) -> str:
    """Return such as "120 s: 75% in steps, 20% saving, 5% starting up": steps first, then by size; without what rounds to 0."""
    total = sum(seconds.values())
    shares = {phase: spent / total if total else 0.0 for phase, spent in seconds.items()}
    order = sorted(shares, key=lambda phase: (phase != "train", -shares[phase]))
    told = [f"{shares[phase]:.0%} {_PHASES.get(phase, phase)}" for phase in order if shares[phase] >= _LEAST_SHARE]
    return f"{total:,.0f} s: {', '.join(told)}"
