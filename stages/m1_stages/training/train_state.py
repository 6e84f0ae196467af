"""What a run remembers besides weights and optimizer state; small, JSON-ready, in every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from m1_stages.curriculum import StagePlan
from m1_stages.guard import GuardState


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Position of a run. ``stage_step`` steps of ``stage`` are done."""

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
    left_out: list[int] = field(default_factory=list)
    """Steps of the stage whose samples are passed over after a roll back."""
    data_fingerprint: str = ""
    first_loss: float = float("nan")
    """Loss of the stage's first step, for its closing report."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Rebuild from ``as_dict``."""
        return cls(**{**values, "guard": GuardState(**values.get("guard", {}))})


def enter_stage(plan: StagePlan, data_fingerprint: str, before: TrainState | None) -> TrainState:
    """Where a stage begins: ``before`` is the end of the one it takes over from, None for random weights.

    The ramp starts at the slopes that ``before`` really ended with, whatever the configuration says they should have been.
    """
    if before is None:
        return TrainState(stage=plan.stage, data_fingerprint=data_fingerprint, slopes=plan.slopes_at(0.0))
    return TrainState(
        stage=plan.stage,
        global_step=before.global_step,
        tokens_seen=before.tokens_seen,
        slopes=before.slopes,
        ramp_from=before.slopes,
        guard=before.guard.at_stage_change(),
        data_fingerprint=data_fingerprint,
    )
