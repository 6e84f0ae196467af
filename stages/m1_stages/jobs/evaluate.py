"""Learning at long range, measured: after each stage of ``m1 pretrain``, and by ``m1 evaluate`` for a finished one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from m1_data.sampling.needles import SHORTEST_TOKENS, Haystack
from m1_data.sampling.packing import Ints, key
from m1_data.storage.manifest import load_manifest
from m1_data.storage.store import Store, open_store
from m1_stages.checkpoint import Committed
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan, plan_stage
from m1_stages.errors import CheckpointError, NumericStop, Preempted
from m1_stages.evaluation.long_context import loss_by_position, needle_map
from m1_stages.evaluation.results import needle_lengths, read_result, write_result
from m1_stages.events import GateForced, NeedleMap, PositionLoss, Sink, StageEvaluated
from m1_stages.runtime.parallel import agree_max, from_rank_0
from m1_stages.runtime.watchdog import beat
from m1_stages.training.session import Session, open_session, with_vocab


def run(resolved: Resolved, stage: str, sinks: Sequence[Sink]) -> None:
    """Evaluate the final checkpoint of ``stage``, whether it was evaluated before or not.

    Raises:
        M1Error: no data, no final checkpoint of the stage, or stopped on request (``Preempted``).
    """
    manifest = load_manifest(resolved.path(resolved.config.data.out))
    resolved = with_vocab(resolved, manifest.vocab_size)
    plan = plan_stage(resolved, stage)
    with open_session(resolved, sinks, rope_base=plan.rope_base, fresh=False) as session:
        found = session.restore([c for c in session.store.committed() if _is_final(c, stage)])
        if found is None:
            raise CheckpointError(
                f"stage {stage} has no final checkpoint to evaluate",
                where=str(session.store.root),
                fix=f"train it first: m1 pretrain --stage {stage}",
            )
        committed, state = found
        session.run.model.set_rope_base(plan.rope_base)
        session.run.model.set_slopes(state.slopes)
        evaluate(session, plan, committed)


def evaluate_finished(session: Session, plan: StagePlan, slopes: list[list[float]]) -> None:
    """Evaluate the stage whose final weights are loaded, unless that was done or is switched off."""
    final = _final(session, plan.stage)
    if not session.resolved.config.evaluate.enabled or final is None:
        return
    if not from_rank_0(read_result(session.resolved.run_dir, plan.stage, final.sha256)):
        session.run.model.set_rope_base(plan.rope_base)
        session.run.model.set_slopes(slopes)
        evaluate(session, plan, final)


def evaluate(session: Session, plan: StagePlan, committed: Committed) -> StageEvaluated:
    """Measure the loaded weights, write ``RUN_DIR/evaluation/STAGE.json`` and report.

    Raises:
        Preempted: a stop was requested; nothing is written, and the same command measures anew.
    """
    began, skipped = time.perf_counter(), []
    config = session.resolved.config
    data_dir = session.resolved.path(config.data.out)
    held_out = open_store(data_dir, held_out=True)
    check = _between_passes(session, plan.stage, committed)
    tokens_at_once = plan.seq_len * plan.micro_batch_rows
    needles: NeedleMap | None = None
    positions: PositionLoss | None = None
    if lengths := needle_lengths(config, plan.stage):
        haystack, what = _haystack(held_out, open_store(data_dir), max(lengths))
        needles = needle_map(
            session.run,
            haystack,
            lengths=lengths,
            depths=sorted(config.evaluate.depths),
            samples=config.evaluate.samples,
            what=what,
            tokens_at_once=tokens_at_once,
            check=check,
        )
    else:
        skipped.append(f"needles: no length of evaluate.lengths reaches {SHORTEST_TOKENS} tokens in this stage")
    documents = _longest(held_out, config.evaluate.documents, plan.seq_len)
    if documents:
        positions = loss_by_position(
            session.run,
            documents,
            seq_len=plan.seq_len,
            pad_id=held_out.eod_id,
            tokens_at_once=tokens_at_once,
            check=check,
        )
    elif config.evaluate.documents:
        skipped.append(
            "loss by position: the prepared data holds no documents out (data.held_out = 0, data.dedup = none, few "
            "documents, or prepared by an older version: m1 prepare-data with another data.out)"
        )
    else:
        skipped.append("loss by position: evaluate.documents is 0")
    result = StageEvaluated(
        stage=plan.stage,
        checkpoint=committed.path.name,
        checkpoint_sha256=committed.sha256,
        global_step=committed.meta.global_step,
        seq_len=plan.seq_len,
        recall=float(np.mean(needles.recall)) if needles else None,
        needles=needles,
        positions=positions,
        skipped=skipped,
        seconds=time.perf_counter() - began,
    )
    if session.run.topology.rank == 0:
        write_result(session.resolved.run_dir, result)
    session.run.emit(result)
    return result


def pass_gate(session: Session, plan: StagePlan, *, force: bool) -> None:
    """Let ``plan`` start only if the stage before recalls enough, or it is forced; a forced start is recorded.

    Raises:
        NumericStop: the stage before recalls less than ``evaluate.gate``, or was not evaluated.
    """
    gate, before = session.resolved.config.evaluate.gate, plan.starts_from
    if not gate or before is None:
        return
    final = _final(session, before)
    result = from_rank_0(read_result(session.resolved.run_dir, before, final.sha256) if final else None)
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
            where=f"{session.resolved.origins.get('evaluate.gate', '')}, key evaluate.gate",
            fix=f"train stage {before} longer or with needle documents, lower the gate, or start it nevertheless: "
            f"m1 pretrain --stage {plan.stage} --force"
            if recall is not None
            else f"run first: m1 evaluate --stage {before}   (or start it nevertheless with --force)",
        )
    forced = GateForced(stage=plan.stage, before=before, recall=recall, gate=gate)
    session.forced_gates.append(dataclasses.asdict(forced))
    session.run.emit(forced)


def _final(session: Session, stage: str) -> Committed | None:
    return next((c for c in session.store.committed() if _is_final(c, stage)), None)


def _is_final(committed: Committed, stage: str) -> bool:
    return committed.meta.stage == stage and committed.meta.stage_final


def _between_passes(session: Session, stage: str, committed: Committed) -> Callable[[], None]:
    def check() -> None:
        beat("evaluate", committed.meta.global_step)
        stop = session.run.stop
        if agree_max(bool(stop.received)):
            raise Preempted(
                f"stopped on {stop.received or 'request'} while stage {stage} was evaluated; its final checkpoint is saved",
                where=str(committed.path),
                fix="run the same command again to evaluate and go on",
            )

    return check


def _haystack(held_out: Store, trained: Store, longest: int) -> tuple[Haystack, str]:
    """Text nobody trained on; without any, random draws of the ids that the training text uses."""
    if held_out.readers:
        return Haystack.of_text(list(held_out.readers.values())), "held-out text"
    alphabet = Haystack.of_text(list(trained.readers.values())).alphabet
    return Haystack.of_random_ids(alphabet, longest, key("needles", "evaluation")), "random token ids"


def _longest(held_out: Store, wanted: int, seq_len: int) -> list[Ints]:
    """Up to ``wanted`` documents: those that fill the context first, whichever comes first among them."""
    found: list[tuple[int, Any, int]] = [
        (min(int(length), seq_len + 1), reader, n)
        for reader in held_out.readers.values()
        for n, length in enumerate(reader.lengths.tolist())
    ]
    found.sort(key=lambda item: -item[0])
    return [np.asarray(reader.get(n, 0, length), dtype=np.int64) for length, reader, n in found[:wanted] if length > 1]
