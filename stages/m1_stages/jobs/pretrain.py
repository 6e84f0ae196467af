"""``m1 pretrain``: the stages of the curriculum, each from the last one's final checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m1_data.sampling.loader import PackedDataset
from m1_data.storage.manifest import Manifest, load_manifest
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.errors import CheckpointError, DataError
from m1_stages.events import Sink, StageStarted
from m1_stages.jobs.evaluate import evaluate_finished, pass_gate
from m1_stages.training.loop import Rows, train_stage
from m1_stages.training.micro_batches import refuse_uneven_pipeline
from m1_stages.training.recompute_choice import Settled, settle
from m1_stages.training.rollback import recorded, without_the_trouble
from m1_stages.training.session import Session, open_session, with_vocab
from m1_stages.training.train_state import TrainState, enter_stage


def run(
    resolved: Resolved, stages: list[str], sinks: Sequence[Sink], *, fresh: bool = False, force: bool = False
) -> None:
    """Train and evaluate ``stages`` in order; finished ones are passed over, an interrupted one is continued.

    Args:
        fresh: put existing checkpoints and metrics aside (renamed, not deleted) and start over.
        force: start a stage although the one before it recalls less than ``evaluate.gate``.

    Raises:
        M1Error: no data, no checkpoint to start from, nothing usable among the checkpoints, numbers out of range, a
            stage before that recalls too little, or stopped on request after saving (``Preempted``).
    """
    data_dir = resolved.path(resolved.config.data.out)
    manifest = load_manifest(data_dir)
    _refuse_other_scale(resolved, manifest)
    resolved = with_vocab(resolved, manifest.vocab_size)
    plans = [plan_stage(resolved, stage) for stage in stages]
    with open_session(resolved, sinks, rope_base=plans[0].rope_base, fresh=fresh) as session:
        refuse_uneven_pipeline(resolved, plans, session.run.topology.dp_size)
        for plan in plans:
            rows = stage_rows(resolved, plan, manifest)
            state = start_stage(session, plan, rows)
            if state.stage_step == 0:
                pass_gate(session, plan, force=force)
            if state.ramp_from:
                plan = plan.starting_from(state.ramp_from)
            if state.stage_step < plan.num_steps:
                begin(session, resolved, plan, rows.mix_plan.as_dict(), state)
                state = train_stage(session.run, plan, rows, state)
            evaluate_finished(session, plan, state.slopes)


def _refuse_other_scale(resolved: Resolved, manifest: Manifest) -> None:
    scale = resolved.config.curriculum.length_scale
    if manifest.length_scale != scale:
        raise DataError(
            f"the data was prepared for length_scale {manifest.length_scale:g}, the configuration says {scale:g}: "
            "documents lie in other length buckets",
            where=f"{resolved.origins.get('curriculum.length_scale', '')}, key curriculum.length_scale",
            fix="run m1 prepare-data again (another data.out keeps the old one)",
        )


def stage_rows(resolved: Resolved, plan: StagePlan, manifest: Manifest) -> PackedDataset:
    """The packed rows of a stage, in an order fixed by seed and stage."""
    config = resolved.config
    return PackedDataset(
        resolved.path(config.data.out),
        config.mix(plan.stage),
        config.mix(plan.starts_from) if plan.starts_from else None,
        seed=config.run.seed,
        seq_len=plan.seq_len,
        num_rows=plan.num_steps * plan.global_batch_rows,
    )


def start_stage(session: Session, plan: StagePlan, rows: Rows) -> TrainState:
    """Find where ``plan`` stands and load it: its own newest checkpoint, the last stage's final one, or nothing.

    Raises:
        CheckpointError: the stage before has no final checkpoint, or the data changed since the checkpoint.
    """
    committed = session.store.committed()
    own = [c for c in committed if c.meta.stage == plan.stage]
    before = [c for c in committed if c.meta.stage == plan.starts_from and c.meta.stage_final]
    if plan.starts_from and not own and not before:
        raise CheckpointError(
            f"stage {plan.stage} starts from the final checkpoint of stage {plan.starts_from}, and there is none",
            where=str(session.store.root),
            fix=f"run first: m1 pretrain --stage {plan.starts_from}   (or --stage all)",
        )
    found = session.restore([*own, *before])
    if found is None:
        if any(c.meta.stage in STAGE_NAMES for c in committed):
            raise CheckpointError(
                f"there are checkpoints here, but none of stage {plan.stage}: random weights would not continue them",
                where=str(session.store.root),
                fix="use another run.dir, or start over with --fresh",
            )
        return enter_stage(plan, rows.fingerprint, None)
    _, state = found
    if state.stage != plan.stage:
        state = enter_stage(plan, rows.fingerprint, state)
    state = without_the_trouble(state, recorded(session.resolved.run_dir, plan.stage, rows.fingerprint))
    if state.stage_step < plan.num_steps and state.data_fingerprint != rows.fingerprint:
        raise CheckpointError(
            "the prepared data, the mix or the seed changed since this stage was interrupted: its order is another one",
            where=f"stage {plan.stage}, step {state.stage_step}",
            fix="restore the data and configuration, or start over with --fresh",
        )
    return state


def begin(session: Session, resolved: Resolved, plan: StagePlan, mix: dict[str, Any], state: TrainState) -> None:
    """Settle what becomes of the stage's activations, and say what the stage changes and takes over."""
    run = session.run
    settled = settle(resolved.config, plan, run.topology, run.device)
    run.model.set_recompute(settled.activations.recompute, offload=settled.activations.offload)
    run.emit(started(resolved, plan, mix, state, settled))


def started(
    resolved: Resolved, plan: StagePlan, mix: dict[str, Any], state: TrainState, settled: Settled
) -> StageStarted:
    """The event that says what a stage changes and what it takes over."""
    if state.stage_step:
        takes_over = f"its own step {state.stage_step}: weights, optimizer, data position, decay ramp"
    elif plan.starts_from and state.global_step:
        takes_over = f"weights and optimizer of the final {plan.starts_from} checkpoint"
    else:
        takes_over = "nothing; its weights are random"
    return StageStarted(
        stage=plan.stage,
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
        takes_over=takes_over,
        recompute=settled.activations.recompute,
        offload_activations=settled.activations.offload,
        activations=str(settled),
    )
