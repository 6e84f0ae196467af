"""Going back to a checkpoint from before a spike, and excluding the samples that made it.

``RUN_DIR/rollbacks.json`` remembers what was excluded, so that a run that is killed after a roll back does not train on the
same samples again. Checkpoints newer than the one gone back to are renamed, not deleted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m1_data.plain_values import from_plain
from m1_data.storage.durable import write_when_there_is_room
from m1_stages.curriculum import StagePlan
from m1_stages.errors import CheckpointError, NumericStop
from m1_stages.events import RolledBack
from m1_stages.guard import Verdict
from m1_stages.run_dir import ROLLBACKS
from m1_stages.runtime.collectives import from_rank_0, rank, run_together
from m1_stages.training.run import Rows, Run
from m1_stages.training.step_events import step_samples
from m1_stages.training.train_state import TrainState, enter_stage

_FORMER_FIELDS = {"left_out": "excluded_steps"}


@dataclass(frozen=True, slots=True)
class RollbackRecord:
    """One roll back, as ``rollbacks.json`` holds it."""

    stage: str
    data_fingerprint: str
    to_global_step: int
    excluded_steps: tuple[int, ...]
    """Steps of the stage."""
    reason: str
    ramp_progress: float = 1.0
    """Progress of the decay ramp when the spike was met."""


def read_rollbacks(run_dir: Path, stage: str, data_fingerprint: str, num_steps: int) -> list[RollbackRecord]:
    """Roll backs of ``stage``, which has ``num_steps`` steps, on this data, the same on every rank.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: list[RollbackRecord] | str = from_rank_0(_read(run_dir) if rank() == 0 else None)
    if isinstance(found, list):
        found = [record for record in found if (record.stage, record.data_fingerprint) == (stage, data_fingerprint)]
        if outside := [step for record in found for step in record.excluded_steps if step >= num_steps]:
            found = f"it excludes step {outside[0]} of stage {stage}, which has {num_steps} steps"
    if isinstance(found, str):
        raise CheckpointError(
            f"the record of roll backs is damaged: {found}",
            where=str(run_dir / ROLLBACKS),
            fix="restore it from a copy, or remove it: samples that were excluded are then trained on again",
        )
    return found


def apply_rollback_exclusions(state: TrainState, records: list[RollbackRecord]) -> TrainState:
    """Change ``state``, loaded from a checkpoint, into what it is after the stage's roll backs, also in a later process."""
    state.excluded_steps = sorted(
        {*state.excluded_steps, *(step for record in records for step in record.excluded_steps)}
    )
    if records and state.global_step <= records[-1].to_global_step:
        state.guard.skipped = []  # these steps will not be met again, so the budget is whole again
        # What the guard took back stays back: the ramp may have been the cause.
        state.ramp_progress = min(state.ramp_progress, records[-1].ramp_progress)
    return state


def roll_back(run: Run, plan: StagePlan, rows: Rows, state: TrainState, verdict: Verdict) -> TrainState:
    """Load the newest checkpoint from before the first of the present spikes; every rank calls it.

    Returns:
        The state of that checkpoint, with the samples of the spikes excluded.

    Raises:
        NumericStop: the stage was rolled back as often as permitted, or there is no such checkpoint.
        CheckpointError: what ``Checkpointer.restore`` raises.
    """
    run.checkpointer.finish_save()
    first_step = state.global_step - state.stage_step
    skipped = state.guard.skipped
    spike = max(first_step, skipped[-max(1, state.guard.consecutive) :][0] - run.guard.exclude_before)
    where = f"stage {plan.stage}, step {state.stage_step}"
    done = read_rollbacks(run.run_dir, plan.stage, rows.fingerprint, plan.num_steps)
    if len(done) >= run.guard.max_rollbacks:
        raise NumericStop(
            f"{verdict.reason}: the stage was rolled back {len(done)} times already",
            where=where,
            fix="lower the learning rate or lengthen the decay ramp, and raise guard.max_rollbacks for another try; "
            "metrics.jsonl names the samples that were excluded",
        )
    store = run.checkpointer.store
    candidates = [
        c
        for c in store.committed()
        if c.meta.global_step <= spike
        and (c.meta.stage == plan.stage or (c.meta.stage == plan.starts_from and c.meta.stage_final))
    ]
    if not candidates:
        raise NumericStop(
            f"{verdict.reason}, and there is no checkpoint from before step {spike - first_step} of the stage",
            where=where,
            fix="lower the learning rate, or save more often (run.save_every_steps)",
        )
    restored = run.checkpointer.restore(candidates)
    assert restored is not None
    committed, loaded = restored
    if loaded.stage != plan.stage:
        loaded = enter_stage(plan, rows.fingerprint, loaded)
    steps = {*range(spike, skipped[-1] + 1), *skipped}
    excluded = sorted(set(state.excluded_steps) | {s - first_step for s in steps if s >= loaded.global_step})
    record = RollbackRecord(
        plan.stage, rows.fingerprint, loaded.global_step, tuple(excluded), verdict.reason, state.ramp_progress
    )
    store.rename_newer(committed, plan.stage)
    run_together(lambda: _append(run.run_dir, record) if rank() == 0 else None)
    run.emit(
        RolledBack(
            stage=plan.stage,
            from_step=state.stage_step,
            to_step=loaded.stage_step,
            checkpoint=str(committed.path),
            excluded_steps=excluded,
            sample_ids=[row for step in excluded for row in step_samples(plan, step)],
            reason=verdict.reason,
        )
    )
    return apply_rollback_exclusions(loaded, [*done, record])


def forget_rollbacks(run_dir: Path, stage: str) -> None:
    """Drop the roll backs of ``stage``, which starts again; every rank calls it.

    Raises:
        CheckpointError: the file is damaged or cannot be written.
    """

    def forget() -> None:
        before = _read(run_dir)
        if isinstance(before, list) and any(record.stage == stage for record in before):
            _write(run_dir, [record for record in before if record.stage != stage])

    run_together(lambda: forget() if rank() == 0 else None)


def _read(run_dir: Path) -> list[RollbackRecord] | str:
    """The records of all stages, or why they cannot be read."""
    path = run_dir / ROLLBACKS
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        records = list(from_plain(tuple[RollbackRecord, ...], _with_present_names(values)))
        if outside := [record.ramp_progress for record in records if not 0 <= record.ramp_progress <= 1]:
            raise ValueError(f"ramp_progress is {outside[0]}, which is not between 0 and 1")
        return records
    except (OSError, ValueError, RecursionError) as error:
        return str(error)


def _with_present_names(values: Any) -> Any:
    """The same values; fields of records have their names of today."""
    if isinstance(values, list):
        return [_with_present_names(item) for item in values]
    return {_FORMER_FIELDS.get(k, k): v for k, v in values.items()} if isinstance(values, dict) else values


def _append(run_dir: Path, record: RollbackRecord) -> None:
    before = _read(run_dir)
    assert not isinstance(before, str)
    _write(run_dir, [*before, record])


def _write(run_dir: Path, records: list[RollbackRecord]) -> None:
    write_when_there_is_room(run_dir / ROLLBACKS, json.dumps([asdict(record) for record in records], indent=1))
