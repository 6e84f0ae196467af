"""The training loop: one visible ``while``. Measurements leave as events; no callback changes what it does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from m1_data.sampling.loader import PackedBatch
from m1_stages.curriculum import StagePlan, move_ramp
from m1_stages.errors import Preempted
from m1_stages.events import StageFinished, StepRepeated
from m1_stages.guard import Guard, Ramp
from m1_stages.runtime.collectives import agree_max
from m1_stages.runtime.stragglers import Stragglers
from m1_stages.runtime.watchdog import heartbeat, report_progress
from m1_stages.training.micro_batches import row_ids
from m1_stages.training.objective import Objective
from m1_stages.training.rollback import roll_back
from m1_stages.training.run import Rows, Run
from m1_stages.training.step import StepResult, train_step
from m1_stages.training.step_events import bad_samples, step_excluded
from m1_stages.training.train_state import TrainState
from m1_stages.training.update import judge_and_apply


def train_stage(run: Run, plan: StagePlan, rows: Rows, state: TrainState, objective: Objective) -> TrainState:
    """Train ``plan`` from ``state.stage_step`` to its end and begin the stage-final checkpoint.

    The stage is finished, and reported so, when that is committed: at once, or beside what follows (``run.async_save``).

    Returns:
        The state at the end; another object than ``state`` after a roll back.

    Raises:
        Preempted: a stop was requested; the run is saved.
        NumericStop: the guard stops the run at a step that is not finite or a spike; the step changed no parameter.
    """
    began, since_step, last_loss = time.perf_counter(), state.stage_step, float("nan")
    run.device.reset_peak_memory()
    run.model.set_rope_base(plan.rope_base)
    end_reports = run.model.before_each_forward(report_progress)
    guard, stragglers = Guard(run.guard, state.guard, run.guess_loss), Stragglers(pipeline=run.topology.pp_size)
    while state.stage_step < plan.num_steps:
        step_began = time.perf_counter()
        heartbeat("data", state.global_step)
        stop = False
        if state.stage_step in state.excluded_steps:
            run.emit(step_excluded(plan, state))
            _advance(plan, state, "hold")
        else:
            batches = _batches(run, plan, rows, state.stage_step)
            state.slopes = plan.slopes_at(state.ramp_progress)
            run.model.set_slopes(state.slopes)
            lr = plan.lr.at(state.stage_step)
            run.optimizer.set_learning_rate(lr)
            heartbeat("train", state.global_step)
            result = train_step(run.trainable, run.optimizer, batches, objective, stop=run.stop.asked, began=step_began)
            if not result.finite and run.guard.rerun_nonfinite:
                result = _repeat(run, plan, state, result, batches, objective)
            stop = result.stop_requested
            verdict = judge_and_apply(
                run, plan, state, result, guard=guard, stragglers=stragglers, lr=lr, began=step_began
            )
            if verdict.action == "roll_back":
                state = roll_back(run, plan, rows, state, verdict)
                guard = Guard(run.guard, state.guard, run.guess_loss)
                continue
            if verdict.action == "apply":
                last_loss = result.loss
                if state.stage_step == 0:
                    state.first_loss = result.loss
            _advance(plan, state, verdict.ramp if run.guard.ramp == "guarded" else "advance")
        if state.stage_step == plan.num_steps:
            break
        run.checkpointer.poll()
        if stop:
            _leave_if_asked(run, state, run.checkpointer.save_now(state))
        if state.stage_step % run.save_every_steps == 0 and not state.guard.consecutive:  # not between spikes
            run.checkpointer.save(state)
    end_reports()
    finished = StageFinished(
        stage=plan.stage,
        steps=plan.num_steps,
        since_step=since_step,
        first_loss=state.first_loss,
        last_loss=last_loss,
        seconds=time.perf_counter() - began,
        checkpoint="",
        ramp_progress=1.0 if state.slopes == plan.slopes_new else min(state.ramp_progress, 0.99),
    )
    run.checkpointer.save_final(state, lambda path: run.emit(replace(finished, checkpoint=str(path))))
    if agree_max(int(bool(run.stop.received))):
        _leave_if_asked(run, state, run.checkpointer.finals(plan.stage)[0].path)
    return state


def _batches(run: Run, plan: StagePlan, rows: Rows, step: int) -> list[PackedBatch]:
    """This rank's micro-batches of a step, on its device."""
    shard = run.topology.cp_rank, run.topology.cp_size
    ids = row_ids(plan, run.topology, step)
    return [rows.batch(row).zigzag(*shard).to(run.device.torch_device) for row in ids]


def _advance(plan: StagePlan, state: TrainState, ramp: Ramp) -> None:
    state.stage_step += 1
    state.global_step += 1
    state.tokens_seen += plan.global_batch_rows * plan.seq_len
    state.ramp_progress = move_ramp(state.ramp_progress, plan.ramp_steps, ramp)


def _repeat(
    run: Run,
    plan: StagePlan,
    state: TrainState,
    first: StepResult,
    batches: list[PackedBatch],
    objective: Objective,
) -> StepResult:
    """Compute a step that was not finite once more: a passing fault does not come back, a bad batch does."""
    again = train_step(run.trainable, run.optimizer, batches, objective, stop=run.stop.asked)
    run.emit(
        StepRepeated(
            stage=plan.stage,
            step=state.stage_step,
            global_step=state.global_step,
            verdict="transient" if again.finite else "reproducible",
            bad_ranks=first.bad_ranks,
            sample_ids=bad_samples(run.topology, plan, state, first),
        )
    )
    return again


def _leave_if_asked(run: Run, state: TrainState, saved_as: Path) -> None:
    if agree_max(int(bool(run.stop.received))):
        raise Preempted(
            f"stopped on {run.stop.received or 'request'} after saving stage {state.stage} step {state.stage_step}",
            where=str(saved_as),
            fix="run the same command again to continue",
        )
