"""A run that only counts steps, with the product's checkpointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_checkpoint import meta, state

from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.events import CheckpointSaved, SaveFailed
from m1_stages.training.checkpointer import Checkpointer
from m1_stages.training.train_state import TrainState


class StepsOnly(Checkpointer):
    """Saves the number of the step instead of a model and its optimizer."""

    def __init__(self, store: CheckpointStore, **how: Any) -> None:
        nothing: Any = None
        parts = {"model": nothing, "trainable": nothing, "optimizer": nothing, "topology": nothing, "resolved": nothing}
        super().__init__(store, **parts, **how)

    def _sharded_state(self, position: TrainState, *, is_loading: bool) -> dict[str, Any]:
        return state(float(position.global_step))

    def _state_to_save(self, position: TrainState) -> tuple[dict[str, Any], None]:
        return self._sharded_state(position, is_loading=False), None

    def _meta(self, position: TrainState, stage_final: bool) -> CheckpointMeta:
        return meta(position.global_step, final=stage_final)


class Job:
    """A run that only counts steps, with the product's checkpointer."""

    def __init__(self, root: Path, *, background: bool = True, deadline_s: float = 60.0) -> None:
        self.stuck: list[str] = []
        self.events: list[Any] = []
        self.store = CheckpointStore(root, deadline_s=deadline_s, on_stuck=self.stuck.append)
        self.checkpointer = StepsOnly(
            self.store, emit=self.events.append, background=background, max_failed=3, patience_s=0.0
        )

    def save(self, *steps: int) -> None:
        for step in steps:
            self.checkpointer.save(TrainState(stage="32k", stage_step=step, global_step=step))

    def save_and_wait(self, *steps: int) -> None:
        for step in steps:
            self.save(step)
            self.checkpointer.finish_save()

    def save_now(self, step: int) -> Path:
        return self.checkpointer.save_now(TrainState(stage="32k", stage_step=step, global_step=step))

    def save_final(self, step: int) -> list[Path]:
        """Begin a final checkpoint; the list gets its path when it is committed."""
        paths: list[Path] = []
        self.checkpointer.save_final(TrainState(stage="32k", stage_step=step, global_step=step), paths.append)
        return paths

    def told(self) -> list[tuple[str, int]]:
        """("saved" or "failed", step) in order."""
        return [
            ("saved", e.global_step) if isinstance(e, CheckpointSaved) else ("failed", e.step)
            for e in self.events
            if isinstance(e, CheckpointSaved | SaveFailed)
        ]
