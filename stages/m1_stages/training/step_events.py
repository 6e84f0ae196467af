"""The events of a step, and the error that ends a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m1_stages.curriculum import StagePlan
from m1_stages.decay import Slopes, half_life_tokens
from m1_stages.errors import NumericStop
from m1_stages.events import GuardNoticed, StepDone, StepExcluded, StragglerNoticed
from m1_stages.guard import Verdict
from m1_stages.runtime.device import Device
from m1_stages.runtime.parallel import Topology
from m1_stages.training.micro_batches import row_ids
from m1_stages.training.step import StepResult
from m1_stages.training.train_state import TrainState


def step_samples(plan: StagePlan, step: int) -> list[int]:
    """Return the sample ids of all rows of a stage's step."""
    return list(range(step * plan.global_batch_rows, (step + 1) * plan.global_batch_rows))


def bad_samples(topology: Topology, plan: StagePlan, state: TrainState, result: StepResult) -> list[int]:
    """Return the sample ids of the micro-batches that were not finite, or of the whole step where no single one is to blame."""
    bad = [row_ids(plan, topology, state.stage_step, dp)[n] for dp, n in sorted(result.bad_micro_batches.items())]
    return sorted(i for ids in bad for i in ids) or step_samples(plan, state.stage_step)


def step_done(
    device: Device, plan: StagePlan, state: TrainState, result: StepResult, lr: float, seconds: float
) -> StepDone:
    """Report one optimizer step, applied or dropped."""
    tokens = plan.global_batch_rows * plan.seq_len
    return StepDone(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        tokens_seen=state.tokens_seen + tokens,
        loss=result.loss,
        aux_loss=result.routing.aux_loss,
        grad_norm=result.grad_norm,
        layer_grad_norms=result.layer_grad_norms,
        lr=lr,
        step_s=seconds,
        tokens_per_s=tokens / seconds,
        ramp_progress=state.ramp_progress,
        trained_tokens=result.trained_tokens,
        metrics=result.metrics,
        expert_load=result.routing.expert_load,
        peak_gib=device.peak_memory_gib(),
        sample_ids=step_samples(plan, state.stage_step),
        half_lives=_half_lives(state.slopes, plan.softmax_layers),
    )


def guard_noticed(
    topology: Topology, plan: StagePlan, state: TrainState, result: StepResult, verdict: Verdict
) -> GuardNoticed:
    """Report a step that the guard warned of or dropped."""
    return GuardNoticed(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        action=verdict.action,
        ramp=verdict.ramp,
        reason=verdict.reason,
        series=verdict.series,
        value=verdict.value,
        median=verdict.median,
        z=verdict.z,
        loss=result.loss,
        grad_norm=result.grad_norm,
        layer_grad_norms=result.layer_grad_norms,
        ramp_progress=state.ramp_progress,
        bad_ranks=result.bad_ranks,
        sample_ids=bad_samples(topology, plan, state, result),
        skipped_in_budget=len(state.guard.skipped),
    )


def step_excluded(plan: StagePlan, state: TrainState) -> StepExcluded:
    """Report a step whose samples are skipped."""
    return StepExcluded(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        sample_ids=step_samples(plan, state.stage_step),
    )


def straggler_noticed(plan: StagePlan, state: TrainState, rank: int, seconds: float, median: float) -> StragglerNoticed:
    """Report a rank that keeps the others waiting."""
    return StragglerNoticed(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        rank=rank,
        seconds=seconds,
        median=median,
    )


def numeric_stop(
    topology: Topology, plan: StagePlan, state: TrainState, result: StepResult, verdict: Verdict
) -> NumericStop:
    """Build the error that ends the run, with samples and ranks."""
    ranks = f", rank {', '.join(map(str, result.bad_ranks))}" if result.bad_ranks else ""
    bad = [n for n, norm in enumerate(result.layer_grad_norms) if not math.isfinite(norm)]
    layers = f", gradients of layers {', '.join(map(str, bad))}" if bad and not result.bad_ranks else ""
    return NumericStop(
        f"{verdict.reason}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; nothing was updated",
        where=f"stage {plan.stage}, step {state.stage_step}, "
        f"samples {_ranges(bad_samples(topology, plan, state, result))}{ranks}{layers}",
        fix="look at these samples, or lower the learning rate; the last checkpoint is untouched",
    )


def _ranges(ids: list[int]) -> str:
    """``3..6, 9``"""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _half_lives(slopes: Slopes, softmax_layers: Sequence[int]) -> list[list[float]]:
    return [
        [] if layer in softmax_layers else [half_life_tokens(max(row)), half_life_tokens(min(row))]
        for layer, row in enumerate(slopes)
    ]
