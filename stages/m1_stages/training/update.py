"""Judges a measured step, applies its update and reports both: the part of a loop that every kind of training shares."""

from __future__ import annotations

import time

from m1_stages.curriculum import StagePlan
from m1_stages.guard import Guard, Observation, Verdict
from m1_stages.runtime.replica_check import check_replicas
from m1_stages.runtime.stragglers import Stragglers
from m1_stages.training.run import Run
from m1_stages.training.step import StepResult
from m1_stages.training.step_events import guard_noticed, numeric_stop, step_done, straggler_noticed
from m1_stages.training.train_state import TrainState


def judge_and_apply(
    run: Run,
    plan: StagePlan,
    state: TrainState,
    result: StepResult,
    *,
    guard: Guard,
    stragglers: Stragglers,
    lr: float,
    began: float,
) -> Verdict:
    """Judge a measured step, apply its update if the guard lets it, and report what happened; every rank calls it.

    The verdict ``roll_back`` is left to the caller: nothing is applied and no step is reported.

    Args:
        state: where the run stands before the step; it is not advanced here.
        guard: takes the step into its state.
        lr: learning rate of the step, for the report.
        began: ``time.perf_counter()`` when the step began.

    Raises:
        NumericStop: the guard stops the run, or replicas of the parameters differ; no parameter was changed.
    """
    verdict = guard.judge(
        Observation(
            step=state.global_step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            layer_grad_norms=result.layer_grad_norms,
        )
    )
    if verdict.reason:
        run.emit(guard_noticed(run.topology, plan, state, result, verdict))
    if verdict.action == "stop":
        raise numeric_stop(run.topology, plan, state, result, verdict)
    if verdict.action == "roll_back":
        return verdict
    if run.check_replicas_every and state.global_step % run.check_replicas_every == 0:
        check_replicas(run.trainable, step=state.global_step)
    if verdict.action == "apply":
        result.apply(max_norm=run.max_grad_norm)
    run.emit(step_done(run.device, plan, state, result, lr, time.perf_counter() - began))
    for rank, seconds, median in stragglers.notice(state.global_step, result.rank_seconds):
        run.emit(straggler_noticed(plan, state, rank, seconds, median))
    return verdict
