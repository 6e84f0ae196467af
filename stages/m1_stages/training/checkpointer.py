"""When checkpoints are written: periodic ones beside training, final ones at once; and how many may fail."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.errors import CheckpointError
from m1_stages.events import CheckpointSaved, SaveFailed, Sink
from m1_stages.runtime.watchdog import beat
from m1_stages.training.train_state import TrainState


@dataclass(kw_only=True, slots=True)
class _Begun:
    state: TrainState
    stage_final: bool
    began: float
    stall_s: float = 0.0


class Saver:
    """Saves a run; every rank calls every method at the same step.

    Args:
        sharded_state: the model, optimizer and position as ``CheckpointStore.begin`` takes them.
        meta: what the checkpoint says about itself, from (state, stage_final).
        background: training goes on while a periodic checkpoint is written.
        max_failed: so many periodic checkpoints in a row that cannot be written end the run.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        sharded_state: Callable[[TrainState], dict[str, Any]],
        meta: Callable[[TrainState, bool], CheckpointMeta],
        emit: Sink,
        background: bool,
        max_failed: int,
    ) -> None:
        self._store, self._sharded_state, self._meta, self._emit = store, sharded_state, meta, emit
        self._background, self._max_failed, self._failed = background, max_failed, 0
        self._begun: _Begun | None = None

    def save(self, state: TrainState) -> None:
        """A periodic checkpoint. When it cannot be written, training goes on and the next one is tried.

        Raises:
            CheckpointError: too many in a row could not be written.
        """
        beat("save", state.global_step)
        self.settle()
        with self._counted(state.global_step):
            self._begin(state, stage_final=False)
        if not self._background:
            self.settle()

    def save_now(self, state: TrainState, *, stage_final: bool) -> str:
        """Commit a checkpoint of this moment and wait for it; returns its path.

        Raises:
            CheckpointError: it could not be written.
        """
        beat("save", state.global_step)
        self.settle()
        self._begin(state, stage_final=stage_final)
        return self._commit(wait=True)

    def poll(self) -> None:
        """At every step boundary: commit what has been written meanwhile; free while nothing is being written.

        Raises:
            CheckpointError: too many in a row could not be written.
        """
        if self._begun is not None:
            with self._counted(self._begun.state.global_step):
                self._commit(wait=False)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            CheckpointError: too many in a row could not be written.
        """
        if self._begun is not None:
            with self._counted(self._begun.state.global_step):
                self._commit(wait=True)

    def _begin(self, state: TrainState, *, stage_final: bool) -> None:
        begun = _Begun(state=copy.copy(state), stage_final=stage_final, began=time.perf_counter())
        self._store.begin(self._sharded_state(state), self._meta(state, stage_final))
        begun.stall_s = time.perf_counter() - begun.began
        self._begun = begun

    def _commit(self, *, wait: bool) -> str:
        """Path of the checkpoint when it is committed now."""
        looked, begun, self._begun = time.perf_counter(), self._begun, None
        assert begun is not None
        path = self._store.poll(wait=wait)
        begun.stall_s += time.perf_counter() - looked
        if path is None:
            self._begun = begun
            return ""
        self._failed = 0
        self._emit(
            CheckpointSaved(
                path=str(path),
                stage=begun.state.stage,
                step=begun.state.stage_step,
                global_step=begun.state.global_step,
                stage_final=begun.stage_final,
                seconds=time.perf_counter() - begun.began,
                stall_s=begun.stall_s,
            )
        )
        return str(path)

    @contextmanager
    def _counted(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self._failed += 1
            self._emit(SaveFailed(step=step, reason=str(error)))
            if self._failed >= self._max_failed:
                raise CheckpointError(
                    f"{self._failed} checkpoints in a row could not be written, the last one because {error.what}",
                    where=error.where,
                    fix=error.fix,
                ) from error
