"""The training loop: one visible ``while``. Measurements leave as events; nothing is called back."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from m1_data.errors import CheckpointError, NumericStop, Preempted
from m1_data.loader import PackedBatch, batch_rows
from m1_stages.config import GuardConfig
from m1_stages.curriculum import StagePlan, move_ramp
from m1_stages.decay import Slopes, half_life_tokens
from m1_stages.engine.batches import micro_batch_rows
from m1_stages.engine.device import Device
from m1_stages.engine.events import (
    CheckpointSaved,
    GuardNoticed,
    SaveFailed,
    Sink,
    StageFinished,
    StepDone,
    StepLeftOut,
    StepRepeated,
)
from m1_stages.engine.optimizer import set_learning_rate
from m1_stages.engine.parallel import Topology, agree_max
from m1_stages.engine.signals import StopRequest
from m1_stages.engine.state import TrainState
from m1_stages.engine.step import StepResult, train_step
from m1_stages.engine.watchdog import beat
from m1_stages.guard import Guard, GuardState, Observation, Ramp, Verdict

if TYPE_CHECKING:
    from m1_stages.model import ModelChunks


class Rows(Protocol):
    """Packed rows in a fixed order: pretraining and fine-tuning data alike."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def batch(self, row_ids: list[int]) -> PackedBatch: ...


@dataclass(kw_only=True, slots=True)
class Run:
    """What one process trains with."""

    device: Device
    topology: Topology
    model: ModelChunks
    """What this rank holds of the bare model."""
    chunks: list[Any]
    """The same as Megatron's schedules take it: each chunk wrapped for data parallelism."""
    optimizer: Any
    emit: Sink
    save: Callable[[TrainState, bool], str]
    """Commit a checkpoint of (state, stage_final) and return its path."""
    save_every_steps: int
    stop: StopRequest
    guard: GuardConfig
    max_grad_norm: float
    """Clip to this; 0: not at all."""
    roll_back: Callable[[StagePlan, Rows, TrainState, Verdict], TrainState]
    """Load the newest checkpoint from before the trouble and return where it stands."""


def train_stage(run: Run, plan: StagePlan, rows: Rows, state: TrainState) -> TrainState:
    """Train ``plan`` from ``state.stage_step`` to its end and commit the stage-final checkpoint.

    Returns:
        The state at the end; another object than ``state`` after a roll back.

    Raises:
        Preempted: a stop was requested; the run is saved.
        NumericStop: a step is not finite or a spike and the guard's means are spent; no parameter was changed by it.
    """
    began, last_loss = time.perf_counter(), float("nan")
    run.model.set_rope_base(plan.rope_base)
    end_beats = run.model.before_each_forward(lambda: beat("train", state.global_step))
    guard = Guard(run.guard, GuardState.from_dict(state.guard))
    while state.stage_step < plan.num_steps:
        step_began = time.perf_counter()
        beat("data", state.global_step)
        stop = False
        if state.stage_step in state.left_out:
            run.emit(_left_out(plan, state))
            _advance(plan, state, "hold")
        else:
            row_ids = _row_ids(run, plan, state.stage_step)
            cp = run.topology.cp_rank, run.topology.cp_size
            batches = [rows.batch(ids).zigzag(*cp).to(run.device.torch_device) for ids in row_ids]
            state.slopes = plan.slopes_at(state.ramp_progress)
            run.model.set_slopes(state.slopes)
            lr = plan.lr.at(state.stage_step)
            set_learning_rate(run.optimizer, lr)
            result = train_step(run.chunks, run.optimizer, batches, stop=run.stop.asked, began=step_began)
            if not result.finite and run.guard.rerun_nonfinite:
                result = _repeat(run, plan, state, result, batches)
            seen = Observation(
                step=state.global_step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                layer_grad_norms=result.layer_grad_norms,
            )
            verdict, stop = guard.judge(seen), result.stop_requested
            state.guard = guard.state.as_dict()
            if verdict.reason:
                run.emit(_noticed(run, plan, state, result, verdict))
            if verdict.action == "stop":
                raise _numeric_stop(run, plan, state, result, verdict)
            if verdict.action == "roll_back":
                state = run.roll_back(plan, rows, state, verdict)
                guard = Guard(run.guard, GuardState.from_dict(state.guard))
                continue
            if verdict.action == "apply":
                result.apply(max_norm=run.max_grad_norm)
                last_loss = result.loss
                if state.stage_step == 0:
                    state.first_loss = result.loss
            run.emit(_step_done(run, plan, state, result, lr, time.perf_counter() - step_began))
            _advance(plan, state, verdict.ramp if run.guard.ramp == "guarded" else "advance")
        if state.stage_step == plan.num_steps:
            break
        if stop:
            _leave_if_asked(run, state, _save(run, state, stage_final=False))
        if state.stage_step % run.save_every_steps == 0:
            try:
                _save(run, state, stage_final=False)
            except CheckpointError as error:
                run.emit(SaveFailed(step=state.global_step, reason=str(error)))
    end_beats()
    path = _save(run, state, stage_final=True)
    run.emit(
        StageFinished(
            stage=plan.stage,
            steps=plan.num_steps,
            first_loss=state.first_loss,
            last_loss=last_loss,
            seconds=time.perf_counter() - began,
            checkpoint=path,
            ramp_progress=state.ramp_progress if plan.ramp_steps else 1.0,
        )
    )
    _leave_if_asked(run, state, path)
    return state


def _advance(plan: StagePlan, state: TrainState, ramp: Ramp) -> None:
    state.stage_step += 1
    state.global_step += 1
    state.tokens_seen += plan.global_batch_rows * plan.seq_len
    state.ramp_progress = move_ramp(state.ramp_progress, plan.ramp_steps, ramp)


def _repeat(run: Run, plan: StagePlan, state: TrainState, first: StepResult, batches: list[PackedBatch]) -> StepResult:
    """Compute a step that was not finite once more: a passing fault does not come back, a bad batch does."""
    again = train_step(run.chunks, run.optimizer, batches, stop=run.stop.asked)
    run.emit(
        StepRepeated(
            stage=plan.stage,
            step=state.stage_step,
            global_step=state.global_step,
            verdict="transient" if again.finite else "reproducible",
            bad_ranks=first.bad_ranks,
            sample_ids=_bad_samples(run, plan, state, first),
        )
    )
    return again


def _leave_if_asked(run: Run, state: TrainState, saved_as: str) -> None:
    if agree_max(bool(run.stop.received)):
        raise Preempted(
            f"stopped on {run.stop.received or 'request'} after saving stage {state.stage} step {state.stage_step}",
            where=saved_as,
            fix="run the same command again to continue",
        )


def _row_ids(run: Run, plan: StagePlan, step: int, dp_rank: int | None = None) -> list[list[int]]:
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


def _bad_samples(run: Run, plan: StagePlan, state: TrainState, result: StepResult) -> list[int]:
    """Of the micro-batches that were not finite, or of the whole step where no single one is to blame."""
    bad = [_row_ids(run, plan, state.stage_step, dp)[n] for dp, n in sorted(result.bad_micro_batches.items())]
    return sorted(i for ids in bad for i in ids) or step_samples(plan, state.stage_step)


def _numeric_stop(run: Run, plan: StagePlan, state: TrainState, result: StepResult, verdict: Verdict) -> NumericStop:
    ranks = f", rank {', '.join(map(str, result.bad_ranks))}" if result.bad_ranks else ""
    bad = [n for n, norm in enumerate(result.layer_grad_norms) if not math.isfinite(norm)]
    layers = f", gradients of layers {', '.join(map(str, bad))}" if bad and not result.bad_ranks else ""
    return NumericStop(
        f"{verdict.reason}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; nothing was updated",
        where=f"stage {plan.stage}, step {state.stage_step}, "
        f"samples {_ranges(_bad_samples(run, plan, state, result))}{ranks}{layers}",
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


def _noticed(run: Run, plan: StagePlan, state: TrainState, result: StepResult, verdict: Verdict) -> GuardNoticed:
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
        sample_ids=_bad_samples(run, plan, state, result),
        skipped_in_budget=len(state.guard["skipped"]),
    )


def _left_out(plan: StagePlan, state: TrainState) -> StepLeftOut:
    return StepLeftOut(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        sample_ids=step_samples(plan, state.stage_step),
    )


def _save(run: Run, state: TrainState, *, stage_final: bool) -> str:
    began = time.perf_counter()
    beat("save", state.global_step)
    path = run.save(state, stage_final)
    run.emit(
        CheckpointSaved(
            path=path,
            stage=state.stage,
            step=state.stage_step,
            global_step=state.global_step,
            stage_final=stage_final,
            seconds=time.perf_counter() - began,
        )
    )
    return path


def _step_done(run: Run, plan: StagePlan, state: TrainState, result: StepResult, lr: float, seconds: float) -> StepDone:
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
