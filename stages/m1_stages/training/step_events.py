"""What the loop says about a step: which samples it trained on, its events, and the error that ends a run."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from m1_data.sampling.loader import batch_rows
from m1_stages.curriculum import StagePlan
from m1_stages.decay import Slopes, half_life_tokens
from m1_stages.errors import NumericStop
from m1_stages.events import GuardNoticed, StepDone, StepLeftOut, StragglerNoticed
from m1_stages.guard import Verdict
from m1_stages.runtime.device import Device
from m1_stages.training.micro_batches import micro_batch_rows
from m1_stages.training.step import StepResult
from m1_stages.training.train_state import TrainState

if TYPE_CHECKING:
    from m1_stages.training.loop import Run


def row_ids(run: Run, plan: StagePlan, step: int, dp_rank: int | None = None) -> list[list[int]]:
    """Rows of a data-parallel rank's (this one's) micro-batches; a pure function of the step."""
    return batch_rows(
        step,
        global_batch=plan.global_batch_rows,
        dp_rank=run.topology.dp_rank if dp_rank is None else dp_rank,
        dp_size=run.topology.dp_size,
        micro_batch=micro_batch_rows(plan, run.topology.dp_size),
    )


def step_samples(plan: StagePlan, step: int) -> list[int]:
    """Sample ids of all rows of a stage's step."""
    return list(range(step * plan.global_batch_rows, (step + 1) * plan.global_batch_rows))


def bad_samples(run: Run, plan: StagePlan, state: TrainState, result: StepResult) -> list[int]:
    """Of the micro-batches that were not finite, or of the whole step where no single one is to blame."""
    bad = [row_ids(run, plan, state.stage_step, dp)[n] for dp, n in sorted(result.bad_micro_batches.items())]
    return sorted(i for ids in bad for i in ids) or step_samples(plan, state.stage_step)


def step_done(run: Run, plan: StagePlan, state: TrainState, result: StepResult, lr: float, seconds: float) -> StepDone:
    """One optimizer step, applied or dropped."""
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
        expert_load=result.routing.expert_load,
        peak_gib=_peak_gib(run.device),
        sample_ids=step_samples(plan, state.stage_step),
        half_lives=_half_lives(state.slopes, plan.softmax_layers),
    )


def noticed(run: Run, plan: StagePlan, state: TrainState, result: StepResult, verdict: Verdict) -> GuardNoticed:
    """What the guard noticed."""
    return GuardNoticed(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        action=verdict.action,
        ramp=verdict.ramp,
        reason=verdict.reason,
        series=verdict.series,
        value=verdict.value,
        usual=verdict.usual,
        z=verdict.z,
        loss=result.loss,
        grad_norm=result.grad_norm,
        layer_grad_norms=result.layer_grad_norms,
        ramp_progress=state.ramp_progress,
        bad_ranks=result.bad_ranks,
        sample_ids=bad_samples(run, plan, state, result),
        skipped_in_budget=len(state.guard.skipped),
    )


def left_out(plan: StagePlan, state: TrainState) -> StepLeftOut:
    """A step whose samples are passed over."""
    return StepLeftOut(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        sample_ids=step_samples(plan, state.stage_step),
    )


def straggler(plan: StagePlan, state: TrainState, rank: int, seconds: float, usual: float) -> StragglerNoticed:
    """A rank that keeps the others waiting."""
    return StragglerNoticed(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        rank=rank,
        seconds=seconds,
        usual=usual,
    )


def numeric_stop(run: Run, plan: StagePlan, state: TrainState, result: StepResult, verdict: Verdict) -> NumericStop:
    """Why the run ends, with samples and ranks."""
    ranks = f", rank {', '.join(map(str, result.bad_ranks))}" if result.bad_ranks else ""
    bad = [n for n, norm in enumerate(result.layer_grad_norms) if not math.isfinite(norm)]
    layers = f", gradients of layers {', '.join(map(str, bad))}" if bad and not result.bad_ranks else ""
    return NumericStop(
        f"{verdict.reason}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; nothing was updated",
        where=f"stage {plan.stage}, step {state.stage_step}, "
        f"samples {_ranges(bad_samples(run, plan, state, result))}{ranks}{layers}",
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


def _peak_gib(device: Device) -> float:
    """Largest memory in use so far: of the GPU, or of this process on a CPU."""
    if device.name == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
