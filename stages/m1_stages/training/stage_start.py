"""Starts or continues a stage: finds its checkpoint, checks that it may start, and announces it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from m1_data.sampling.stage_draw import order_version
from m1_stages.checkpoint.changed_settings import (
    refuse_changes,
    refuse_other_adapters,
    settings_changed,
    start_over,
)
from m1_stages.checkpoint.imported import refuse_beside_import
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.sft_runs import IMPORT, SFT, is_sft
from m1_stages.curriculum import StagePlan, train_command
from m1_stages.errors import CheckpointError, DataError, NumericStop
from m1_stages.evaluation.results import read_result
from m1_stages.event_values import LaterStages
from m1_stages.events import GateForced, StageStarted
from m1_stages.plan.hardware import gpu_of_device
from m1_stages.plan.layout import layout_from_sizes
from m1_stages.plan.search import step_costs
from m1_stages.runtime.collectives import from_rank_0
from m1_stages.training.recompute_choice import RecomputeDecision, choose_recompute
from m1_stages.training.rollback import apply_rollback_exclusions, forget_rollbacks, read_rollbacks
from m1_stages.training.run import Rows, Run
from m1_stages.training.train_state import TrainState, enter_stage


def start_over_from(run: Run, stage: str) -> None:
    """Rename the checkpoints of ``stage`` and of all that was made from it, and drop their roll backs; every rank calls it.

    Of pretraining, that is every later stage and the plain fine-tuning as well, whatever they say that they were made from.
    """
    later = (*STAGE_NAMES, SFT)
    names = set(later[later.index(stage) :]) if stage in STAGE_NAMES else {stage}
    names |= {c.meta.stage for c in run.checkpointer.store.committed() if stage in c.meta.extra.get("contexts", {})}
    for name in sorted(names):
        run.checkpointer.store.rename_stage(name)
        forget_rollbacks(run.run_dir, name)


def restore_stage(
    run: Run, resolved: Resolved, plan: StagePlan, rows: Rows, *, ended: TrainState | None = None
) -> TrainState:
    """Find where ``plan`` stands and load it: its own newest checkpoint, else the final one of the stage before, else nothing.

    Args:
        ended: what the model and the optimizer hold now, if this process has just trained a stage to its end: the next one goes
            on from memory, with the values that its final checkpoint, which may still be being written, will give back.

    Raises:
        CheckpointError: the stage before has no final checkpoint.
        DataError: the data changed since the checkpoint.
        ConfigError: a key changed that cannot change any more.
    """
    store = run.checkpointer.store
    committed = store.committed()
    if not (is_sft(plan.stage) and resolved.config.sft.base_stage == IMPORT):  # it was asked for
        refuse_beside_import(plan, committed)
    own = [c for c in committed if c.meta.stage == plan.stage]
    if ended is not None and ended.stage == plan.starts_from and not own:
        state = enter_stage(plan, rows.fingerprint, TrainState.from_dict(ended.as_dict()))
        return apply_rollback_exclusions(
            state, read_rollbacks(run.run_dir, plan.stage, rows.fingerprint, plan.num_steps)
        )
    before = run.checkpointer.finals(plan.starts_from) if plan.starts_from else []
    if plan.starts_from and not own and not before:
        raise CheckpointError(
            f"stage {plan.stage} starts from the final checkpoint of stage {plan.starts_from}, and there is none",
            where=str(store.root),
            fix=f"run first: {train_command(plan.starts_from)}{'' if is_sft(plan.starts_from) else '   (or --stage all)'}",
        )
    refuse_changes([*own[:1], *before[:1]], resolved, plan)
    refuse_other_adapters(own[:1], plan)
    found = run.checkpointer.restore([*own, *before])
    if found is None:
        if any(c.meta.stage in STAGE_NAMES for c in committed):
            raise CheckpointError(
                f"there are checkpoints here, but none of stage {plan.stage}: random weights would not continue them",
                where=str(store.root),
                fix="use another run.dir, or start over with --fresh",
            )
        return enter_stage(plan, rows.fingerprint, None)
    loaded, state = found
    finished = loaded.meta.stage == plan.stage and loaded.meta.stage_final
    if state.stage != plan.stage:
        state = enter_stage(plan, rows.fingerprint, state)
    state = apply_rollback_exclusions(state, read_rollbacks(run.run_dir, plan.stage, rows.fingerprint, plan.num_steps))
    if not finished:
        refuse_other_order(plan, state, rows.fingerprint)
    same_order = order_version(state.data_fingerprint) == order_version(rows.fingerprint)
    if state.data_fingerprint != rows.fingerprint and (not finished or (is_sft(plan.stage) and same_order)):
        source, files = ("conversations", "key sft.data") if is_sft(plan.stage) else ("prepared data", "key data.out")
        since = "finished" if finished else f"interrupted at step {state.stage_step}"
        raise DataError(
            f"the {source} changed since {plan.title} was {since}: fingerprint {state.data_fingerprint[:12]} -> "
            f"{rows.fingerprint[:12]}",
            where=f"{files}; {loaded.path}",
            fix=f"restore the files, or {start_over(plan)}",
        )
    if not finished and (changed := settings_changed(loaded, resolved, plan, state.stage_step)) is not None:
        run.emit(changed)
    return state


def refuse_other_order(plan: StagePlan, state: TrainState, fingerprint: str) -> None:
    """Refuse to continue a stage that began with a version of m1 that orders rows differently: some would come twice.

    Raises:
        CheckpointError: the rows of ``state`` and those of ``fingerprint`` have orders of different versions.
    """
    old, new = order_version(state.data_fingerprint), order_version(fingerprint)
    if old != new:
        raise CheckpointError(
            f"{plan.title} began with a version of m1 that draws its rows in order {old}; this version draws them in order "
            f"{new}: some would be trained twice and others never",
            where=f"stage {plan.stage}, step {state.stage_step}",
            fix="finish this stage with the version of m1 that began it (later stages can use this one), or start over with "
            "--fresh",
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


def announce_stage(
    run: Run,
    resolved: Resolved,
    plan: StagePlan,
    mix: dict[str, Any],
    state: TrainState,
    *,
    later: Sequence[StagePlan] = (),
) -> RecomputeDecision:
    """Choose what becomes of the stage's activations, and report what the stage changes and what it starts from.

    Args:
        mix: what all rows of the stage hold.
        later: the stages that the same command trains after this one.
    """
    decision = choose_recompute(resolved.config, plan, run.topology, run.device)
    run.model.set_recompute(decision.activations.recompute, offload=decision.activations.offload)
    imported = run.checkpointer.imported
    if plan.starts_from == IMPORT and not state.stage_step:
        kept = "stays" if plan.rope_base == imported["rope_base"] else "becomes"
        starts_from = (
            f"the imported {imported['source']}: its weights, with a fresh optimizer; the RoPE base {kept} "
            f"{plan.rope_base / 1e6:g}M, the decay rates {'move from its own' if plan.ramp_steps else 'stay its own'}"
        )
    elif plan.lora is not None and not state.stage_step:
        starts_from = (
            f"the weights of the final {plan.starts_from} checkpoint, which stay as they are; adapters are trained"
        )
    elif state.stage_step:
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
            later=_later_stages(run, resolved, plan, later) if later else None,
        )
    )
    return decision


def _later_stages(run: Run, resolved: Resolved, plan: StagePlan, later: Sequence[StagePlan]) -> LaterStages:
    names = [x.stage for x in later]
    layout = layout_from_sizes(resolved.config.parallel, run.topology.sizes())
    costs, basis = step_costs(resolved.config, [plan.stage, *names], layout, gpu_of_device(run.device.gpu_name()))
    steps = sum(x.num_steps * costs[x.stage] for x in later) / costs[plan.stage]
    return LaterStages(stages=names, cost_in_steps=steps, basis=basis)
