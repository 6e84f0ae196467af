"""``m1 evaluate``: measure the final checkpoint of a stage at long range; ``m1 pretrain`` does it after each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from m1_data.storage.store import PreparedData, open_prepared
from m1_stages.checkpoint import Committed
from m1_stages.checkpoint.imported import imported_checkpoint, with_imported_base
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.errors import CheckpointError, Preempted
from m1_stages.evaluation.long_context import Subject
from m1_stages.evaluation.results import read_result
from m1_stages.evaluation.stage_evaluation import evaluate_stage
from m1_stages.events import Sink
from m1_stages.jobs.prepared import described
from m1_stages.runtime.collectives import agree_max, from_rank_0
from m1_stages.runtime.watchdog import heartbeat
from m1_stages.training.run import Run
from m1_stages.training.session import open_session, with_vocab


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
        committed, state = found
        _evaluate(opened, resolved, plan, committed, state.slopes, data)


def evaluate_finished(
    run: Run, resolved: Resolved, plan: StagePlan, slopes: list[list[float]], data: PreparedData
) -> None:
    """Evaluate the stage whose final weights are loaded, unless that was done or is switched off.

    Raises:
        Preempted: a stop was requested; nothing is written, and the same command measures again.
    """
    finals = run.checkpointer.finals(plan.stage)
    if not resolved.config.evaluate.enabled or not finals:
        return
    if not from_rank_0(read_result(run.run_dir, plan.stage, finals[0].sha256)):
        _evaluate(run, resolved, plan, finals[0], slopes, data)


def _evaluate(
    run: Run, resolved: Resolved, plan: StagePlan, committed: Committed, slopes: list[list[float]], data: PreparedData
) -> None:
    run.model.set_rope_base(plan.rope_base)
    run.model.set_slopes(slopes)
    subject = Subject(model=run.trainable, topology=run.topology, device=run.device)
    check = _between_passes(run, plan.stage, committed)
    evaluate_stage(resolved, subject, plan, committed, data, emit=run.emit, check=check)


def _between_passes(run: Run, stage: str, committed: Committed) -> Callable[[], None]:
    def check() -> None:
        heartbeat("evaluate", committed.meta.global_step)
        if agree_max(int(run.stop.asked())):
            raise Preempted(
                f"stopped on {run.stop.received or 'request'} while stage {stage} was evaluated; its final checkpoint is saved",
                where=str(committed.path),
                fix="run the same command again to evaluate and go on",
            )

    return check
