"""Decides what a run's checkpoints hold and when they are written, and restores one.

Checkpoints are written beside training (in the background, by default on a GPU) or while the loop waits. One that must be
written, the final one of a stage and the one before leaving, is tried again from its copy in host memory while it fails: a
stage counts as finished when its final checkpoint is committed. A disk that is full for a while costs messages: the run ends when
``run.max_failed_saves`` consecutive saves have failed and the first of them is ``SAVE_PATIENCE_S`` seconds ago.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1_data.storage.durable import FULL_DISK_S
from m1_stages.checkpoint import CheckpointMeta, CheckpointStore, Committed
from m1_stages.checkpoint.imported import unrounded, weights_to_load
from m1_stages.checkpoint.snapshot import Gather
from m1_stages.checkpoint.tokenizer_identity import refuse_other_tokenizer
from m1_stages.config import Resolved, WhenChanged
from m1_stages.config.lora import LoraConfig, recorded_lora
from m1_stages.config.sft_runs import IMPORT
from m1_stages.config.when_changed import changed_keys, recorded_values
from m1_stages.errors import CheckpointError
from m1_stages.events import CheckpointSaved, SaveFailed, Sink
from m1_stages.runtime.collectives import from_rank_0
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.optimizer import Optimizer
from m1_stages.runtime.parallel import Topology
from m1_stages.runtime.watchdog import heartbeat, report_progress
from m1_stages.training.train_state import TrainState

if TYPE_CHECKING:
    from m1_stages.model import ModelChunks  # it imports Megatron-Core, and the device is chosen first

SAVE_PATIENCE_S = FULL_DISK_S
_LOOK_S = 0.2
_RETRY_S = 5.0
"""Seconds after which a checkpoint that must be written is tried again."""
_SHARDING = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclass(kw_only=True, slots=True)
class _Save:
    """A checkpoint that is being written."""

    state: TrainState
    stage_final: bool
    must: bool
    """It is tried again while it cannot be written; one that need not be is given up."""
    then: Callable[[Path], None]
    """Called with its path when it is committed."""
    began: float
    stall_s: float = 0.0
    again_at: float | None = None
    """When to write it again, after a failure."""


class Checkpointer:
    """Saves and restores a run; every rank calls every method at the same step.

    Args:
        store: the checkpoints of the run.
        model: this rank's part of the bare model.
        trainable: the same chunks, wrapped for data parallelism.
        optimizer: the optimizer of its parameters.
        topology: the layout, which checkpoints name.
        resolved: the configuration, which checkpoints name.
        emit: where events go.
        background: training goes on while a periodic checkpoint is written.
        lora: the adapters of ``model``, which are what is trained.
        max_failed: the run ends when this many consecutive checkpoints could not be written,
        patience_s: and this many seconds have passed since the first of them.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        model: ModelChunks,
        trainable: TrainableModel,
        optimizer: Optimizer,
        topology: Topology,
        resolved: Resolved,
        emit: Sink,
        background: bool,
        max_failed: int,
        lora: LoraConfig | None = None,
        patience_s: float = SAVE_PATIENCE_S,
    ) -> None:
        self.store = store
        self.forced_gates: list[dict[str, Any]] = []
        """Stages on the way to these weights that were started although the one before recalled too little."""
        self.imported: dict[str, Any] = {}
        """What the run's first weights were imported from; empty when they were random."""
        self.tokenizer_sha256 = ""
        """The tokenizer of this run's data: checkpoints name it, and those of another are refused."""
        self._lora = lora
        self._model, self._trainable, self._optimizer = model, trainable, optimizer
        self._topology, self._resolved, self._emit = topology, resolved, emit
        self._background, self._max_failed, self._failed = background, max_failed, 0
        self._patience_s, self._failing_since = patience_s, 0.0
        self._save: _Save | None = None

    def save(self, state: TrainState) -> None:
        """Write a periodic checkpoint. When it cannot be written, training goes on and the next one is tried.

        Raises:
            CheckpointError: too many consecutive ones could not be written.
        """
        self._start(state, stage_final=False, must=False, then=lambda path: None)

    def save_now(self, state: TrainState) -> Path:
        """Commit a checkpoint of this moment, trying again while it fails, and wait for it; returns its path.

        Raises:
            CheckpointError: too many consecutive ones could not be written.
        """
        paths: list[Path] = []
        self._start(state, stage_final=False, must=True, then=paths.append)
        self.finish_save()
        return paths[0]

    def save_final(self, state: TrainState, then: Callable[[Path], None]) -> None:
        """Write the final checkpoint of a stage, trying again while it fails; training may go on meanwhile.

        Args:
            then: called with its path when it is committed, in a later ``poll`` perhaps.

        Raises:
            CheckpointError: too many consecutive ones could not be written.
        """
        self._start(state, stage_final=True, must=True, then=then)

    def when_final(self, stage: str, then: Callable[[Committed], None]) -> None:
        """Call ``then`` with the final checkpoint of ``stage``: now, or when it is committed if it is being written."""
        if self._save is None or not self.is_writing_final(stage):
            then(self.finals(stage)[0])
            return
        before = self._save.then

        def both(path: Path) -> None:
            before(path)
            then(next(c for c in self.finals(stage) if c.path == path))

        self._save.then = both

    def is_writing_final(self, stage: str) -> bool:
        """Whether the final checkpoint of ``stage`` is being written; the same on all ranks."""
        return self._save is not None and self._save.stage_final and self._save.state.stage == stage

    def poll(self) -> None:
        """At every step boundary: commit what has been written meanwhile. It costs nothing while nothing is being written.

        Raises:
            CheckpointError: too many consecutive ones could not be written.
        """
        if self._save is not None:
            self._look(self._save, wait=False)

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            CheckpointError: too many consecutive ones could not be written.
        """
        if self._save is not None:
            heartbeat("save", self._save.state.global_step)
        while self._save is not None:
            self._look(self._save, wait=True)
            if self._save is not None:
                _wait_a_little()

    def restore(self, candidates: Sequence[Committed]) -> tuple[Committed, TrainState] | None:
        """Load the first of ``candidates`` that verifies; None when there are none.

        Raises:
            CheckpointError: there are candidates, but none can be used.
        """
        self.finish_save()
        heartbeat("load" if candidates else "build")
        for committed in candidates:
            self._refuse_other_shape(committed)
            refuse_other_tokenizer(
                committed, self.tokenizer_sha256, self._resolved.path(self._resolved.config.data.out)
            )
        with self._optimizer.loading() if candidates else nullcontext():
            found = self.store.load_first_verified(candidates, self._state_to_load)
            if found is None:
                return None
            committed, loaded = found
            if self._has_optimizer(committed):
                self._model.load_state_dict(loaded["model"])
                self._optimizer.load_state_dict(loaded["optimizer"])
        heartbeat("build")
        if not self._has_optimizer(committed):
            self._start_from(committed, loaded["model"])
        self.imported = committed.meta.extra.get("import", {})
        saved = committed.meta.extra.get("forced_gates", [])
        self.forced_gates = saved + [gate for gate in self.forced_gates if gate not in saved]  # also after a roll back
        return committed, TrainState.from_dict(loaded["train_state"])

    def _start_from(self, committed: Committed, weights: dict[str, Any]) -> None:
        """Take over weights alone: merged with the adapters of ``committed`` if it has any, with new ones of this run."""
        from m1_stages.model.lora import adapters_of, merge

        with adapters_of(self._model, recorded_lora(committed.meta.extra)):
            self._model.load_state_dict(weights)
            merge(self._model)
            exact = unrounded(self._model, weights)
        self._model.reset_adapters(seed=self._resolved.config.run.seed)
        self._optimizer.start_afresh(exact)

    def finals(self, stage: str) -> list[Committed]:
        """Committed final checkpoints of ``stage``, newest first; one that is being written is waited for."""
        if self.is_writing_final(stage):
            self.finish_save()
        return [c for c in self.store.committed() if c.meta.stage == stage and c.meta.stage_final]

    def _start(self, state: TrainState, *, stage_final: bool, must: bool, then: Callable[[Path], None]) -> None:
        heartbeat("save", state.global_step)
        self.finish_save()
        while True:
            began = time.perf_counter()
            with self._failures_counted(state.global_step):
                sharded, gathered = self._state_to_save(state)
                self.store.begin(sharded, self._meta(state, stage_final), gathered=gathered, repeatable=must)
                self._save = _Save(state=copy.copy(state), stage_final=stage_final, must=must, then=then, began=began)
                self._save.stall_s = time.perf_counter() - began
            if self._save is not None or not must:
                break
            retry_at = time.monotonic() + self._retry_s
            while time.monotonic() < retry_at:
                _wait_a_little()
        if not self._background:
            self.finish_save()

    def _look(self, save: _Save, *, wait: bool) -> None:
        """Commit ``save`` if it is written; after a failure, give it up or write it again when it is time for that."""
        self._save, path, failed = None, None, True
        with self._failures_counted(save.state.global_step):
            if save.again_at is not None:
                if from_rank_0(time.monotonic() < save.again_at):
                    self._save = save
                    return
                self.store.write_again()
                save.again_at = None
            looked = time.perf_counter()
            path = self.store.poll(wait=wait)
            save.stall_s += time.perf_counter() - looked
            failed = False
        if path is not None:
            self._committed(save, path)
        elif not failed:
            self._save = save
        elif save.must:
            save.again_at = time.monotonic() + self._retry_s
            self._save = save

    def _committed(self, save: _Save, path: Path) -> None:
        self._failed = 0
        self._emit(
            CheckpointSaved(
                path=str(path),
                stage=save.state.stage,
                step=save.state.stage_step,
                global_step=save.state.global_step,
                stage_final=save.stage_final,
                seconds=time.perf_counter() - save.began,
                stall_s=save.stall_s,
                write_s=self.store.write_s,
            )
        )
        save.then(path)

    @property
    def _retry_s(self) -> float:
        return min(_RETRY_S, self._patience_s)

    @contextmanager
    def _failures_counted(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since if self._failed else now
            self._failed += 1
            self._emit(SaveFailed(step=step, reason=str(error)))
            lasting = now - self._failing_since >= self._patience_s
            if from_rank_0(lasting and self._failed >= self._max_failed):
                raise CheckpointError(
                    f"{self._failed} consecutive checkpoints could not be written, the last one because {error.what}",
                    where=error.where,
                    fix=error.fix,
                ) from error

    def _state_to_save(self, state: TrainState) -> tuple[dict[str, Any], Gather | None]:
        """What ``store.begin`` takes."""
        gathered = self._optimizer.gathered_state()
        if gathered is None:
            return self._sharded_state(state, is_loading=False), None
        with gathered.planning():
            return self._sharded_state(state, is_loading=False), gathered.gather

    def _sharded_state(self, state: TrainState, *, is_loading: bool) -> dict[str, Any]:
        """Model, optimizer and position as ``dist_checkpointing`` takes them; every rank calls it."""
        self._trainable.gather_parameters()
        metadata: dict[str, Any] = {**_SHARDING}  # Megatron adds the data-parallel group, which ends with the session
        model = self._model.sharded_state_dict(metadata=metadata)
        optimizer = self._optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "train_state": state.as_dict()}

    def _has_optimizer(self, committed: Committed) -> bool:
        """Whether a checkpoint has optimizer state of what is trained here: not after an import, nor with other adapters."""
        return committed.meta.stage != IMPORT and recorded_lora(committed.meta.extra) == self._lora

    def _state_to_load(self, committed: Committed) -> dict[str, Any]:
        """What to load of ``committed``."""
        if self._has_optimizer(committed):
            return self._sharded_state(TrainState(stage=""), is_loading=True)
        from m1_stages.model.lora import adapters_of

        with adapters_of(self._model, recorded_lora(committed.meta.extra)):
            model = self._model.sharded_state_dict(metadata={**_SHARDING})
        if committed.meta.stage == IMPORT:
            model = weights_to_load(model, committed)
        return {"model": model, "train_state": TrainState(stage="").as_dict()}

    def _meta(self, state: TrainState, stage_final: bool) -> CheckpointMeta:
        """Describe a checkpoint of ``state``."""
        return CheckpointMeta(
            stage=state.stage,
            stage_step=state.stage_step,
            global_step=state.global_step,
            stage_final=stage_final,
            config_sha256=self._resolved.sha256,
            data_fingerprint=state.data_fingerprint,
            topology=self._topology.sizes(),
            decay={"policy": self._resolved.config.curriculum.decay, "slopes": state.slopes},
            extra={
                "tokens_seen": state.tokens_seen,
                "config": recorded_values(self._resolved),
                "model": self._model_section(),
                "rope_base": self._model.rope_base,
                "contexts": state.contexts,
                "entered_at": state.entered_at,
                "forced_gates": self.forced_gates,
                "tokenizer_sha256": self.tokenizer_sha256,
                **({"import": self.imported} if self.imported else {}),
                **({"lora": self._lora.as_dict()} if self._lora else {}),
            },
        )

    def _model_section(self) -> dict[str, Any]:
        return dict(self._resolved.as_dict()["model"])

    def _refuse_other_shape(self, committed: Committed) -> None:
        """Refuse a checkpoint of another model by the key, not by a shape error."""
        saved = {f"model.{key}": value for key, value in committed.meta.extra.get("model", {}).items()}
        for change in changed_keys(saved, self._resolved):
            if change.rule is WhenChanged.FIXED_FOR_RUN:
                raise CheckpointError(
                    f"the checkpoint has {change.key} = {change.old}, the configuration says {change.new}",
                    where=str(committed.path),
                    fix=f"set {change.key} back, use another run.dir, or start over with --fresh",
                )


def _wait_a_little() -> None:
    report_progress()
    time.sleep(_LOOK_S)
