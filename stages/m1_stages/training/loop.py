"""The training loop: one visible ``while``. Measurements leave as events; nothing is called back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from m1_data.sampling.loader import PackedBatch
from m1_stages.config import GuardConfig
from m1_stages.curriculum import StagePlan, move_ramp
from m1_stages.errors import Preempted
from m1_stages.events import Sink, StageFinished, StepRepeated
from m1_stages.guard import Guard, Observation, Ramp, Verdict
from m1_stages.runtime.device import Device
from m1_stages.runtime.optimizer import set_learning_rate
from m1_stages.runtime.parallel import Topology, agree_max
from m1_stages.runtime.replica_check import check_replicas
from m1_stages.runtime.signals import StopRequest
from m1_stages.runtime.stragglers import Stragglers
from m1_stages.runtime.watchdog import beat
from m1_stages.training.checkpointer import Saver
from m1_stages.training.step import StepResult, train_step
from m1_stages.training.step_events import bad_samples, left_out, noticed, numeric_stop, row_ids, step_done, straggler
from m1_stages.training.train_state import TrainState

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
    save_every_steps: int
    stop: StopRequest
    check_replicas_every: int
    guard: GuardConfig
    max_grad_norm: float
    """Clip to this; 0: not at all."""
    roll_back: Callable[[StagePlan, Rows, TrainState, Verdict], TrainState]
    """Load the newest checkpoint from before the trouble and return where it stands."""
    guess_loss: float = math.inf
    """Loss of guessing uniformly, nats."""
    saver: Saver = field(init=False)


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
    guard, stragglers = Guard(run.guard, state.guard, run.guess_loss), Stragglers(pipeline=run.topology.pp_size)
    while state.stage_step < plan.num_steps:
        step_began = time.perf_counter()
        beat("data", state.global_step)
        stop = False
        if state.stage_step in state.left_out:
            run.emit(left_out(plan, state))
            _advance(plan, state, "hold")
        else:
            ids = row_ids(run, plan, state.stage_step)
            cp = run.topology.cp_rank, run.topology.cp_size
            batches = [rows.batch(row).zigzag(*cp).to(run.device.torch_device) for row in ids]
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
            if verdict.reason:
                run.emit(noticed(run, plan, state, result, verdict))
            if verdict.action == "stop":
                raise numeric_stop(run, plan, state, result, verdict)
            if verdict.action == "roll_back":
                state = run.roll_back(plan, rows, state, verdict)
                guard = Guard(run.guard, state.guard, run.guess_loss)
                continue
            if run.check_replicas_every and state.global_step % run.check_replicas_every == 0:
                check_replicas(run.chunks, step=state.global_step)
            if verdict.action == "apply":
                result.apply(max_norm=run.max_grad_norm)
                last_loss = result.loss
                if state.stage_step == 0:
                    state.first_loss = result.loss
            run.emit(step_done(run, plan, state, result, lr, time.perf_counter() - step_began))
            for rank, seconds, usual in stragglers.notice(state.global_step, result.rank_seconds):
                run.emit(straggler(plan, state, rank, seconds, usual))
            _advance(plan, state, verdict.ramp if run.guard.ramp == "guarded" else "advance")
        if state.stage_step == plan.num_steps:
            break
        run.saver.poll()
        if stop:
            _leave_if_asked(run, state, run.saver.save_now(state, stage_final=False))
        if state.stage_step % run.save_every_steps == 0 and not state.guard.in_a_row:  # not in the middle of trouble
            run.saver.save(state)
    end_beats()
    path = run.saver.save_now(state, stage_final=True)
    run.emit(
        StageFinished(
            stage=plan.stage,
            steps=plan.num_steps,
            first_loss=state.first_loss,
            last_loss=last_loss,
            seconds=time.perf_counter() - began,
            checkpoint=path,
            ramp_progress=1.0 if state.slopes == plan.slopes_new else min(state.ramp_progress, 0.99),
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
            sample_ids=bad_samples(run, plan, state, first),
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
