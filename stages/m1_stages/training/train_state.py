"""Holds what a run remembers besides weights and optimizer state: small plain values, in every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from m1_stages.curriculum import StagePlan
from m1_stages.guard import GuardState

_FORMER_FIELDS = {"left_out": "excluded_steps"}


@dataclass(kw_only=True, slots=True)
class TrainState:
    """The position of a run: ``stage_step`` steps of ``stage`` are done."""

    stage: str
    stage_step: int = 0
    global_step: int = 0
    tokens_seen: int = 0
    ramp_progress: float = 0.0
    slopes: list[list[float]] = field(default_factory=list)
    """Slopes of the last step, exactly as used."""
    ramp_from: list[list[float]] = field(default_factory=list)
    """Slopes that the stage's ramp starts from: those of the last step of the stage before."""
    guard: GuardState = field(default_factory=GuardState)
    excluded_steps: list[int] = field(default_factory=list)
    """Steps of the stage whose samples are skipped after a roll back."""
    data_fingerprint: str = ""
    first_loss: float = float("nan")
    """Loss of the stage's first step, for its closing report."""
    contexts: dict[str, int] = field(default_factory=dict)
    """Tokens per row of every stage on the way to these weights, in order; empty in runs that version 0.1 began."""
    entered_at: dict[str, int] = field(default_factory=dict)
    """``tokens_seen`` when each of these stages began; older versions did not record it."""

    def as_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Rebuild from ``as_dict``, also under the names that version 0.1 wrote."""
        present = {_FORMER_FIELDS.get(name, name): value for name, value in values.items()}
        return cls(**present | {"guard": GuardState.from_dict(values.get("guard", {}))})


def enter_stage(plan: StagePlan, data_fingerprint: str, before: TrainState | None) -> TrainState:
    """Return the state in which a stage begins.

    The ramp starts at the slopes that ``before`` really ended with, whatever the configuration says they should have been.

    Args:
        before: the end of the stage that it continues; None for random weights.
    """
    if before is None:
        return TrainState(
            stage=plan.stage,
            data_fingerprint=data_fingerprint,
            slopes=plan.slopes_at(0.0),
            contexts={plan.stage: plan.seq_len},
            entered_at={plan.stage: 0},
        )
    return TrainState(
        stage=plan.stage,
        global_step=before.global_step,
        tokens_seen=before.tokens_seen,
        slopes=before.slopes,
        ramp_from=before.slopes,
        guard=before.guard.at_stage_change(),
        data_fingerprint=data_fingerprint,
        contexts=before.contexts | {plan.stage: plan.seq_len} if before.contexts else {},
        entered_at=before.entered_at | {plan.stage: before.tokens_seen},
    )
