"""Going back to a checkpoint from before the trouble, and leaving out the samples that made it.

``RUN_DIR/rollbacks.json`` remembers what was left out, so that a run that is killed after a roll back does not walk into the
same samples again. Checkpoints newer than the one gone back to are renamed, not deleted.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from m1_stages.curriculum import StagePlan
from m1_stages.errors import CheckpointError, NumericStop
from m1_stages.events import RolledBack
from m1_stages.guard import Verdict
from m1_stages.runtime.collectives import run_together
from m1_stages.training.train_state import TrainState, enter_stage

if TYPE_CHECKING:
    from m1_stages.training.loop import Rows
    from m1_stages.training.session import Session

ROLLBACKS = "rollbacks.json"


@dataclass(frozen=True, slots=True)
class _Record:
    stage: str
    data_fingerprint: str
    to_global_step: int
    left_out: list[int]
    """Steps of the stage."""
    reason: str
    ramp_progress: float = 1.0
    """Of the decay ramp, when the trouble was met."""


def recorded(run_dir: Path, stage: str, data_fingerprint: str) -> list[_Record]:
    """Roll backs of ``stage`` on this data, the same on every rank.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: list[Any] = [_read(run_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise CheckpointError(
            f"the record of roll backs is damaged: {found[0]}",
            where=str(run_dir / ROLLBACKS),
            fix="restore it from a copy, or remove it: samples that were left out are then trained on again",
        )
    return [record for record in found[0] if (record.stage, record.data_fingerprint) == (stage, data_fingerprint)]


def without_the_trouble(state: TrainState, records: list[_Record]) -> TrainState:
    """``state``, loaded from a checkpoint, as it is after the stage's roll backs: also in a process that was started later."""
    state.left_out = sorted({*state.left_out, *(step for record in records for step in record.left_out)})
    if records and state.global_step <= records[-1].to_global_step:
        state.guard.skipped = []  # they will not be met again, so the budget is whole again
        # What the guard took back stays back: the ramp may have been the cause.
        state.ramp_progress = min(state.ramp_progress, records[-1].ramp_progress)
    return state


def roll_back(session: Session, plan: StagePlan, rows: Rows, state: TrainState, verdict: Verdict) -> TrainState:
    """Load the newest checkpoint from before the first of the present spikes; every rank calls it.

    Raises:
        NumericStop: the stage was rolled back as often as permitted, or there is no such checkpoint.
        CheckpointError: what ``Session.restore`` raises.
    """
    run, config = session.run, session.run.guard
    run.saver.settle()
    session.saver.settle()
    first_step = state.global_step - state.stage_step
    skipped = state.guard.skipped
    trouble = max(first_step, skipped[-max(1, state.guard.in_a_row) :][0] - config.exclude_before)
    where = f"stage {plan.stage}, step {state.stage_step}"
    done = recorded(session.resolved.run_dir, plan.stage, rows.fingerprint)
    if len(done) >= config.max_rollbacks:
        raise NumericStop(
            f"{verdict.reason}: the stage was rolled back {len(done)} times already",
            where=where,
            fix="lower the learning rate or lengthen the decay ramp, and raise guard.max_rollbacks for another try; "
            "metrics.jsonl names the samples that were left out",
        )
    candidates = [
        c
        for c in session.store.committed()
        if c.meta.global_step <= trouble
        and (c.meta.stage == plan.stage or (c.meta.stage == plan.starts_from and c.meta.stage_final))
    ]
    if not candidates:
        raise NumericStop(
            f"{verdict.reason}, and there is no checkpoint from before step {trouble - first_step} of the stage",
            where=where,
            fix="lower the learning rate, or save more often (run.save_every_steps)",
        )
    restored = session.restore(candidates)
    assert restored is not None
    committed, loaded = restored
    if loaded.stage != plan.stage:
        loaded = enter_stage(plan, rows.fingerprint, loaded)
    steps = {*range(trouble, skipped[-1] + 1), *skipped}
    left_out = sorted(set(state.left_out) | {s - first_step for s in steps if s >= loaded.global_step})
    record = _Record(plan.stage, rows.fingerprint, loaded.global_step, left_out, verdict.reason, state.ramp_progress)
    session.store.set_aside_newer(committed, plan.stage)
    run_together(lambda: _append(session.resolved.run_dir, record) if dist.get_rank() == 0 else None)
    batch = plan.global_batch_rows
    run.emit(
        RolledBack(
            stage=plan.stage,
            from_step=state.stage_step,
            to_step=loaded.stage_step,
            checkpoint=str(committed.path),
            left_out=left_out,
            sample_ids=[row for step in left_out for row in range(step * batch, (step + 1) * batch)],
            reason=verdict.reason,
        )
    )
    return without_the_trouble(loaded, [*done, record])


def _read(run_dir: Path) -> list[_Record] | str:
    path = run_dir / ROLLBACKS
    if not path.exists():
        return []
    try:
        return [_Record(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        return str(error)


def _append(run_dir: Path, record: _Record) -> None:
    before = _read(run_dir)
    assert not isinstance(before, str)
    path = run_dir / ROLLBACKS
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        json.dump([asdict(r) for r in (*before, record)], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)
