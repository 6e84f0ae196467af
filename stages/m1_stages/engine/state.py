"""What a run remembers besides weights and optimizer state; small, JSON-ready, in every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
    data_fingerprint: str = ""
    first_loss: float = float("nan")
    """Loss of the stage's first step, for its closing report."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Rebuild from ``as_dict``."""
        return cls(**values)
