"""``m1 evaluate``: measure the final checkpoint of a stage at long range; ``m1 pretrain`` does it after each stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from m1_data.sft.dataset import SFTDataset
from m1_data.storage.store import PreparedData, open_prepared
from m1_stages.checkpoint import Committed
from m1_stages.checkpoint.imported import imported_checkpoint, with_imported_base
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.errors import CheckpointError, Preempted
from m1_stages.evaluation.domain_loss import loss_by_domain
from m1_stages.evaluation.long_context import Subject
from m1_stages.evaluation.results import is_measured, read_result, write_result
from m1_stages.evaluation.stage_evaluation import measure_stage
from m1_stages.events import HeldOutMeasured, Sink, StageEvaluated
from m1_stages.jobs.prepared import described
from m1_stages.runtime.collectives import agree_max, from_rank_0
from m1_stages.runtime.watchdog import heartbeat
from m1_stages.training.run import Run
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.train_state import TrainState


def run(resolved: Resolved, stage: str, sinks: Sequence[Sink]) -> None:
    """Evaluate the final checkpoint of ``stage``, whether it was evaluated before or not.

    Raises:
        M1Error: no data, no final checkpoint of the stage, or stopped on request (``Preempted``).
    """
    data = open_prepared(resolved.path(resolved.config.data.out))
    resolved = with_vocab(resolved, data.manifest.vocab_size)
    plan = with_imported_base(plan_stage(resolved, stage), imported_checkpoint(resolved.run_dir))
    with open_session(resolved, sinks, rope_base=plan.rope_base, fresh=False, data=described(data)) as opened:
        opened.checkpointer.tokenizer_sha256 = data.manifest.tokenizer_sha256
        found = opened.checkpointer.restore(opened.checkpointer.finals(stage))
        if found is None:
            raise CheckpointError(
                f"stage {stage} has no final checkpoint to evaluate",
                where=str(opened.checkpointer.store.root),
                fix=f"train it first: m1 pretrain --stage {stage}",
            )
        _, state = found
        _evaluate(opened, resolved, plan, state, data)


def evaluate_finished(run: Run, resolved: Resolved, plan: StagePlan, state: TrainState, data: PreparedData) -> None:
    """Evaluate the stage whose final weights are loaded, unless that was done or is switched off.

    Their checkpoint may still be being written: the result is written and reported when it is committed.

    Raises:
        Preempted: a stop was requested; nothing is written, and the same command measures again.
    """
    if not resolved.config.evaluate.enabled:
        return
    if not run.checkpointer.is_writing_final(plan.stage):
        finals = run.checkpointer.finals(plan.stage)
        if not finals or from_rank_0(read_result(run.run_dir, plan.stage, finals[0].sha256)):
            return
    _evaluate(run, resolved, plan, state, data)


def measure_held_out(run: Run, plan: StagePlan, state: TrainState, rows: SFTDataset, *, again: bool = False) -> None:
    """Measure the loss by domain of the conversations that fine-tuning held out, unless that was done.

    Args:
        again: measure whether it was done or not.

    Raises:
        Preempted: as ``evaluate_finished``.
    """
    if not rows.held_out:
        return
    if not again and not run.checkpointer.is_writing_final(plan.stage):
        finals = run.checkpointer.finals(plan.stage)
        if not finals or from_rank_0(is_measured(run.run_dir, plan.stage, finals[0].sha256)):
            return
    began = time.perf_counter()
    domains = loss_by_domain(
        _subject(run, plan, state),
        rows,
        tokens_at_once=plan.seq_len * plan.micro_batch_rows,
        check=lambda: _between_passes(run, state),
    )
    tokens = sum(d.trained_tokens for d in domains)
    measured = HeldOutMeasured(
        stage=plan.stage,
        checkpoint="",
        checkpoint_sha256="",
        global_step=0,
        loss=sum(d.loss * d.trained_tokens for d in domains) / tokens,
        domains=domains,
        seconds=time.perf_counter() - began,
    )
    _report_when_final(run, plan, measured)


def _evaluate(run: Run, resolved: Resolved, plan: StagePlan, state: TrainState, data: PreparedData) -> None:
    subject = _subject(run, plan, state)
    measured = measure_stage(resolved, subject, plan, data, check=lambda: _between_passes(run, state))
    _report_when_final(run, plan, measured)


def _subject(run: Run, plan: StagePlan, state: TrainState) -> Subject:
    run.model.set_rope_base(plan.rope_base)
    run.model.set_slopes(state.slopes)
    return Subject(model=run.trainable, topology=run.topology, device=run.device)


def _report_when_final(run: Run, plan: StagePlan, measured: StageEvaluated | HeldOutMeasured) -> None:
    def report(committed: Committed) -> None:
        result = replace(
            measured,
            checkpoint=committed.path.name,
            checkpoint_sha256=committed.sha256,
            global_step=committed.meta.global_step,
        )
        if run.topology.rank == 0:
            write_result(run.run_dir, result)
        run.emit(result)

    run.checkpointer.when_final(plan.stage, report)


def _between_passes(run: Run, state: TrainState) -> None:
    heartbeat("evaluate", state.global_step)
    if agree_max(int(run.stop.asked())):
        raise Preempted(
            f"stopped on {run.stop.received or 'request'} while stage {state.stage} was evaluated; its final checkpoint is saved",
            where=str(run.checkpointer.finals(state.stage)[0].path),
            fix="run the same command again to evaluate and go on",
        )
    if run.checkpointer.is_writing_final(state.stage):
        run.device.synchronize()  # a commit would wait for the passes that were begun, and count that as its own stall
        run.checkpointer.poll()
