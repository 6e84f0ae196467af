"""The evaluation of one stage: recall of needles and loss by position with the loaded weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from m1_data.arrays import Ints
from m1_data.sampling.needles import SHORTEST_TOKENS, Haystack
from m1_data.seeded_random import derive_seed
from m1_data.storage.store import PreparedData, Store
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan
from m1_stages.evaluation.long_context import Subject, loss_by_position, needle_map
from m1_stages.event_values import NeedleMap, PositionLoss
from m1_stages.events import StageEvaluated
from m1_stages.plan.stage_workload import needle_lengths


def measure_stage(
    resolved: Resolved, subject: Subject, plan: StagePlan, data: PreparedData, *, check: Callable[[], None]
) -> StageEvaluated:
    """Measure the loaded weights; every rank calls it.

    Args:
        data: whose held-out documents are measured on.
        check: called between passes on every rank; whatever it raises ends the measurement.

    Returns:
        The result, which does not name the checkpoint yet.
    """
    began, skipped = time.perf_counter(), []
    config = resolved.config
    held_out = data.held_out
    tokens_at_once = plan.seq_len * plan.micro_batch_rows
    needles: NeedleMap | None = None
    positions: PositionLoss | None = None
    if lengths := needle_lengths(config, plan.stage):
        haystack, what = _haystack(held_out, data.training, max(lengths))
        needles = needle_map(
            subject,
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
            subject,
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
    return StageEvaluated(
        stage=plan.stage,
        checkpoint="",
        checkpoint_sha256="",
        global_step=0,
        seq_len=plan.seq_len,
        recall=float(np.mean(needles.recall)) if needles else None,
        needles=needles,
        positions=positions,
        skipped=skipped,
        seconds=time.perf_counter() - began,
    )


def _haystack(held_out: Store, trained: Store, longest: int) -> tuple[Haystack, str]:
    """Text that was held out from training, and its name; without any, random draws of the ids that the training text uses."""
    if held_out.readers:
        return Haystack.of_text(list(held_out.readers.values())), "held-out text"
    alphabet = Haystack.of_text(list(trained.readers.values())).alphabet
    return Haystack.of_random_ids(alphabet, longest, derive_seed("needles", "evaluation")), "random token ids"


def _longest(held_out: Store, wanted: int, seq_len: int) -> list[Ints]:
    """Up to ``wanted`` documents: those that fill the context, else the longest."""
    found: list[tuple[int, Any, int]] = [
        (min(int(length), seq_len + 1), reader, n)
        for reader in held_out.readers.values()
        for n, length in enumerate(reader.lengths.tolist())
    ]
    found.sort(key=lambda item: -item[0])
    return [np.asarray(reader.get(n, 0, length), dtype=np.int64) for length, reader, n in found[:wanted] if length > 1]
