"""Starts or continues a stage: finds its checkpoint, checks that it may start, and announces it."""

from __future__ import annotations

import dataclasses
from typing import Any

from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.curriculum import StagePlan
from m1_stages.errors import CheckpointError, NumericStop
from m1_stages.evaluation.results import read_result
from m1_stages.events import GateForced, StageStarted
from m1_stages.runtime.collectives import from_rank_0
from m1_stages.training.recompute_choice import choose_recompute
from m1_stages.training.rollback import apply_rollback_exclusions, read_rollbacks
from m1_stages.training.run import Rows, Run
from m1_stages.training.train_state import TrainState, enter_stage


def restore_stage(run: Run, plan: StagePlan, rows: Rows) -> TrainState:
    """Find where ``plan`` stands and load it: its own newest checkpoint, else the final one of the stage before, else nothing.

    Raises:
        CheckpointError: the stage before has no final checkpoint, or the data changed since the checkpoint.
    """
    store = run.checkpointer.store
    committed = store.committed()
    own = [c for c in committed if c.meta.stage == plan.stage]
    before = [c for c in committed if c.meta.stage == plan.starts_from and c.meta.stage_final]
    if plan.starts_from and not own and not before:
        raise CheckpointError(
            f"stage {plan.stage} starts from the final checkpoint of stage {plan.starts_from}, and there is none",
            where=str(store.root),
            fix=f"run first: m1 pretrain --stage {plan.starts_from}   (or --stage all)",
        )
    found = run.checkpointer.restore([*own, *before])
    if found is None:
        if any(c.meta.stage in STAGE_NAMES for c in committed):
            raise CheckpointError(
                f"there are checkpoints here, but none of stage {plan.stage}: random weights would not continue them",
                where=str(store.root),
                fix="use another run.dir, or start over with --fresh",
            )
        return _with_identity(enter_stage(plan, rows.fingerprint, None), rows)
    _, state = found
    if state.stage != plan.stage:
        state = enter_stage(plan, rows.fingerprint, state)
    state = apply_rollback_exclusions(state, read_rollbacks(run.run_dir, plan.stage, rows.fingerprint))
    if state.stage_step < plan.num_steps and state.data_fingerprint != rows.fingerprint:
        raise CheckpointError(
            f"{_what_changed(state.data_identity, rows.identity)} since this stage was interrupted: its order is another one",
            where=f"stage {plan.stage}, step {state.stage_step}",
            fix="restore the data and configuration, or start over with --fresh",
        )
    return _with_identity(state, rows)


def _with_identity(state: TrainState, rows: Rows) -> TrainState:
    """Record what the order of the rows is made of; a finished stage keeps what it was trained with."""
    if state.data_fingerprint == rows.fingerprint:
        state.data_identity = dict(rows.identity)
    return state


def _what_changed(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """Name each part of the rows' identity that is not what was saved, with both values."""
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if not saved or not changed:
        return "the prepared data, the mix or the seed changed"
    return "; ".join(f"{key} changed from {saved.get(key)} to {now.get(key)}" for key in changed[:4]) + (
        f"; and {len(changed) - 4} more," if len(changed) > 4 else ""
    )


def pass_gate(run: Run, resolved: Resolved, plan: StagePlan, *, force: bool) -> None:
    """Let ``plan`` start only if the stage before recalls enough, or it is forced; a forced start is recorded.

    Raises:
        NumericStop: the stage before recalls less than ``evaluate.gate``, or was not evaluated.
    """
    gate, before = resolved.config.evaluate.gate, plan.starts_from
    if not gate or before is None:
        return
    finals = run.checkpointer.finals(before)
    result = from_rank_0(read_result(run.run_dir, before, finals[0].sha256) if finals else None)
    recall = result["recall"] if result else None
    if recall is not None and recall >= gate:
        return
    if not force:
        raise NumericStop(
            f"stage {plan.stage} may not start: stage {before} recalls {recall:.1%} of the needles, evaluate.gate asks "
            f"for {gate:.1%}"
            if recall is not None
            else f"stage {plan.stage} may not start: evaluate.gate asks for a recall of {gate:.1%}, and that of stage "
            f"{before} is not known",
            where=f"{resolved.origins.get('evaluate.gate', '')}, key evaluate.gate",
            fix=f"train stage {before} longer or with needle documents, lower the gate, or start it nevertheless: "
            f"m1 pretrain --stage {plan.stage} --force"
            if recall is not None
            else f"run first: m1 evaluate --stage {before}   (or start it nevertheless with --force)",
        )
    forced = GateForced(stage=plan.stage, before=before, recall=recall, gate=gate)
    run.checkpointer.forced_gates.append(dataclasses.asdict(forced))
    run.emit(forced)


def announce_stage(run: Run, resolved: Resolved, plan: StagePlan, mix: dict[str, Any], state: TrainState) -> None:
    """Choose what becomes of the stage's activations, and report what the stage changes and what it starts from."""
    decision = choose_recompute(resolved.config, plan, run.topology, run.device)
    run.model.set_recompute(decision.activations.recompute, offload=decision.activations.offload)
    if state.stage_step:
        starts_from = f"its own step {state.stage_step}: weights, optimizer, data position, decay ramp"
    elif plan.starts_from and state.global_step:
        starts_from = f"weights and optimizer of the final {plan.starts_from} checkpoint"
    else:
        starts_from = "random weights"
    run.emit(
        StageStarted(
            stage=plan.stage,
            title=plan.title,
            step=state.stage_step,
            num_steps=plan.num_steps,
            seq_len=plan.seq_len,
            context_tokens=plan.context_tokens,
            rope_base=plan.rope_base,
            global_batch_rows=plan.global_batch_rows,
            tokens=plan.tokens,
            lr_peak=plan.lr.peak,
            lr_final=plan.lr.final,
            decay_policy=resolved.config.curriculum.decay,
            ramp_steps=plan.ramp_steps,
            slopes_old=plan.slopes_old,
            slopes_new=plan.slopes_new,
            softmax_layers=list(plan.softmax_layers),
            mix=mix,
            starts_from=starts_from,
            recompute=decision.activations.recompute,
            offload_activations=decision.activations.offload,
            activations=str(decision),
        )
    )
