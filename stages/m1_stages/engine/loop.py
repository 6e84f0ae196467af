"""The training loop: one visible ``while``. Measurements leave as events; nothing is called back."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from m1_data.errors import CheckpointError, NumericStop, Preempted
from m1_data.loader import PackedBatch, batch_rows
from m1_stages.curriculum import StagePlan, advance_ramp
from m1_stages.engine.batches import micro_batch_rows
from m1_stages.engine.device import Device
from m1_stages.engine.events import CheckpointSaved, SaveFailed, Sink, StageFinished, StepDone
from m1_stages.engine.optimizer import set_learning_rate
from m1_stages.engine.parallel import Topology, agree_max
from m1_stages.engine.signals import StopRequest
from m1_stages.engine.state import TrainState
from m1_stages.engine.step import StepResult, train_step
from m1_stages.engine.watchdog import beat

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


def train_stage(run: Run, plan: StagePlan, rows: Rows, state: TrainState) -> None:
    """Train ``plan`` from ``state.stage_step`` to its end and commit the stage-final checkpoint.

    Raises:
        Preempted: a stop was requested; the run is saved.
        NumericStop: a loss or gradient is not finite; no parameter was changed by that step.
    """
    began, last_loss = time.perf_counter(), float("nan")
    run.model.set_rope_base(plan.rope_base)
    end_beats = run.model.before_each_forward(lambda: beat("train", state.global_step))
    while state.stage_step < plan.num_steps:
        step_began = time.perf_counter()
        beat("data", state.global_step)
        row_ids = _row_ids(run, plan, state.stage_step)
        cp = run.topology.cp_rank, run.topology.cp_size
        batches = [rows.batch(ids).zigzag(*cp).to(run.device.torch_device) for ids in row_ids]
        state.slopes = plan.slopes_at(state.ramp_progress)
        run.model.set_slopes(state.slopes)
        lr = plan.lr.at(state.stage_step)
        set_learning_rate(run.optimizer, lr)
        result = train_step(run.chunks, run.optimizer, batches)
        _refuse_non_finite(run, plan, state, result, row_ids)
        result.gradients.apply()
        last_loss = result.loss
        if state.stage_step == 0:
            state.first_loss = result.loss
        seconds = time.perf_counter() - step_began
        run.emit(_step_done(run, plan, state, result, lr, seconds))
        state.stage_step += 1
        state.global_step += 1
        state.tokens_seen += plan.global_batch_rows * plan.seq_len
        state.ramp_progress = advance_ramp(state.ramp_progress, plan.ramp_steps)
        if state.stage_step == plan.num_steps:
            break
        if agree_max(bool(run.stop.received)):
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
        )
    )
    _leave_if_asked(run, state, path)


def _leave_if_asked(run: Run, state: TrainState, saved_as: str) -> None:
    if agree_max(bool(run.stop.received)):
        raise Preempted(
            f"stopped on {run.stop.received or 'request'} after saving stage {state.stage} step {state.stage_step}",
            where=saved_as,
            fix="run the same command again to continue",
        )


def _row_ids(run: Run, plan: StagePlan, step: int) -> list[list[int]]:
    """Rows of this data-parallel rank's micro-batches; a pure function of the step."""
    return batch_rows(
        step,
        global_batch=plan.global_batch_rows,
        dp_rank=run.topology.dp_rank,
        dp_size=run.topology.dp_size,
        micro_batch=micro_batch_rows(plan, run.topology.dp_size),
    )


def _refuse_non_finite(
    run: Run, plan: StagePlan, state: TrainState, result: StepResult, row_ids: list[list[int]]
) -> None:
    finite = result.gradients.finite and result.loss == result.loss and abs(result.loss) != float("inf")
    if agree_max(not finite):
        first = state.stage_step * plan.global_batch_rows
        raise NumericStop(
            f"loss {result.loss} with gradient norm {result.gradients.norm}: nothing was updated",
            where=f"stage {plan.stage}, step {state.stage_step}, "
            f"samples {first}..{first + plan.global_batch_rows - 1}, rank {run.topology.rank}",
            fix="lower the learning rate, or look at these samples; the last checkpoint is untouched",
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
    first = state.stage_step * plan.global_batch_rows
    routing = run.model.routing_stats()
    return StepDone(
        stage=plan.stage,
        step=state.stage_step,
        global_step=state.global_step,
        tokens_seen=state.tokens_seen + tokens,
        loss=result.loss,
        aux_loss=routing.aux_loss,
        grad_norm=result.gradients.norm,
        layer_grad_norms=result.layer_grad_norms,
        lr=lr,
        step_s=seconds,
        tokens_per_s=tokens / seconds,
        ramp_progress=state.ramp_progress,
        trained_tokens=result.trained_tokens,
        expert_load=routing.expert_load,
        peak_gib=_peak_gib(run.device),
        sample_ids=list(range(first, first + plan.global_batch_rows)),
    )


def _peak_gib(device: Device) -> float:
    """Largest memory in use so far: of the GPU, or of this process on a CPU."""
    if device.name == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
