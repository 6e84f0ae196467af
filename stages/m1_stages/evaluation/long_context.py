"""Forward passes over rows made for the purpose: recall of needles, and loss by position in a document.

They run in any parallel layout, and every rank gets the same numbers. They leave training untouched: no gradients, no routing
statistics, no random numbers. Logits exist for the answers' tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m1_data.arrays import Ints
from m1_data.sampling.loader import PackedBatch, Segment, collate, zigzag
from m1_data.sampling.needles import VALUE_TOKENS, Haystack, needle_document
from m1_data.seeded_random import derive_seed
from m1_stages.event_values import NeedleMap, PositionLoss
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.device import Device
from m1_stages.runtime.parallel import Topology

NEAR = 16
"""The control for the loss by position sees pieces of this part of the context."""
_FIRST_POSITIONS = 16
_MOST_ROWS = 64
_SEED = derive_seed("needles", "evaluation")


class MarkedRow(NamedTuple):
    """A row of documents, and where it is measured: ``marks`` [length] int64 names a result, or is -1."""

    segments: list[Segment]
    marks: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The subject of a measurement: a model, its layout and its device."""

    model: TrainableModel
    topology: Topology
    device: Device


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRows:
    """``number`` rows of ``length`` tokens, made when they are needed; at most ``tokens_at_once`` in one pass of a rank."""

    number: int
    length: int
    row: Callable[[int], MarkedRow]
    tokens_at_once: int
    pad_id: int


def needle_map(
    subject: Subject,
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    what: str,
    tokens_at_once: int,
    check: Callable[[], None],
) -> NeedleMap:
    """Recall of needle documents by teacher-forced argmax, with the same questions over nothing hidden as control.

    Args:
        lengths: tokens of the documents; context and tensor parallelism must divide them.
        what: what the haystack is, for the record.
        tokens_at_once: tokens of one forward pass.
        check: called between passes on every rank; whatever it raises ends the measurement.
    """
    cells = len(depths) + 1
    table: list[Any] = []
    for length in lengths:

        def row(index: int, length: int = length) -> MarkedRow:
            sample, cell = divmod(index, cells)
            hidden = cell < len(depths)
            at = depths[cell] if hidden else 0.0
            document = needle_document(haystack, seed=_SEED, length=length, depths=[at], sample=sample, hidden=hidden)
            marks = np.full(length, -1, dtype=np.int64)
            first = document.answers[0] - 1  # where the first value token is predicted
            marks[first : first + VALUE_TOKENS] = index * VALUE_TOKENS + np.arange(VALUE_TOKENS)
            return MarkedRow(_segments(document.tokens, np.append(document.tokens[1:], 0), length), marks)

        rows = EvaluationRows(number=samples * cells, length=length, row=row, tokens_at_once=tokens_at_once, pad_id=0)
        scores = torch.zeros(rows.number * VALUE_TOKENS, 2, dtype=torch.float64, device=subject.device.torch_device)
        for marks, values in forward_rows(subject, rows, check, argmax=True):
            scores[marks] = values.double()
        table.append(summed_everywhere(scores).view(samples, cells, VALUE_TOKENS, 2).cpu())
    grid = torch.stack(table)  # [length, sample, cell, value token, (loss, right)]
    means = grid.mean((1, 3))
    exact = grid[..., 1].prod(3).mean(1)
    return NeedleMap(
        lengths=list(lengths),
        depths=list(depths),
        samples=samples,
        haystack=what,
        recall=means[:, :-1, 1].tolist(),
        exact=exact[:, :-1].tolist(),
        loss=means[:, :-1, 0].tolist(),
        control_recall=means[:, -1, 1].tolist(),
        control_loss=means[:, -1, 0].tolist(),
    )


def loss_by_position(
    subject: Subject,
    documents: Sequence[Ints],
    *,
    seq_len: int,
    pad_id: int,
    tokens_at_once: int,
    check: Callable[[], None],
) -> PositionLoss:
    """Mean loss by the number of tokens before the predicted one, in buckets of powers of two.

    The same tokens are predicted a second time from documents cut into pieces of a ``NEAR``-th of the context: what is
    gained beyond that is the use of the far context, not of easier text.

    Args:
        documents: token ids; what exceeds ``seq_len`` is excluded.
    """
    near = max(_FIRST_POSITIONS, seq_len // NEAR)
    longest = min(seq_len, max(len(d) for d in documents))
    edges = [1]
    while (next_edge := max(_FIRST_POSITIONS, 2 * edges[-1])) < longest:
        edges.append(next_edge)

    def row(index: int) -> MarkedRow:
        document, cut = documents[index // 2], index % 2
        ids, following = document[:seq_len], document[1 : seq_len + 1]
        labels = np.full(len(ids), pad_id, dtype=np.int64)
        labels[: len(following)] = following
        marks = np.full(seq_len, -1, dtype=np.int64)
        before = np.arange(1, min(len(following), seq_len - 1) + 1)
        marks[: len(before)] = np.searchsorted(edges, before, side="right") - 1 + cut * len(edges)
        return MarkedRow(_segments(ids, labels, near if cut else seq_len), marks)

    rows = EvaluationRows(
        number=2 * len(documents), length=seq_len, row=row, tokens_at_once=tokens_at_once, pad_id=pad_id
    )
    sums = torch.zeros(2 * len(edges), 2, dtype=torch.float64, device=subject.device.torch_device)
    for marks, values in forward_rows(subject, rows, check, argmax=False):
        sums.index_add_(0, marks, torch.stack([values.double(), torch.ones_like(values).double()], 1))
    whole, pieces = summed_everywhere(sums).cpu().view(2, len(edges), 2)
    return PositionLoss(
        first=edges,
        loss=(whole[:, 0] / whole[:, 1]).tolist(),
        near_loss=(pieces[:, 0] / pieces[:, 1]).tolist(),
        tokens=[int(n) for n in whole[:, 1].tolist()],
        documents=[sum(len(d) > edge for d in documents) for edge in edges],
        near_tokens=near,
    )


def _segments(ids: Ints, labels: Ints, piece: int) -> list[Segment]:
    starts = range(0, len(ids), piece)
    return [
        Segment(ids[at : at + piece], labels[at : at + piece], np.ones(len(ids[at : at + piece]), dtype=bool))
        for at in starts
    ]


def forward_rows(
    subject: Subject, rows: EvaluationRows, check: Callable[[], None], *, argmax: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run all rows; yields this rank's marks [P] and values: [P, 2] loss and right, or [P] loss, on the last stage.

    All ranks make the same number of equal passes, because experts and stages of a pipeline work together.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    t = subject.topology
    each = max(1, min(rows.tokens_at_once // rows.length, _MOST_ROWS, -(-rows.number // t.dp_size)))
    passes = parallel_state.get_pipeline_model_parallel_world_size()
    with _measuring(subject.model):
        for first in range(0, rows.number, each * t.dp_size * passes):
            check()
            starts = [first + (n * t.dp_size + t.dp_rank) * each for n in range(passes)]
            batches = [_batch(subject, rows, range(start, start + each), argmax=argmax) for start in starts]
            yield from get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=[iter(batches) for _ in subject.model] if len(subject.model) > 1 else iter(batches),
                model=subject.model.chunks if len(subject.model) > 1 else subject.model[0],
                num_microbatches=passes,
                seq_length=each * rows.length,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
    check()


class _Marked(NamedTuple):
    batch: PackedBatch
    at: Tensor
    """[P] int64 indices into this rank's tokens."""
    marks: Tensor
    """[P] int64 names of their results."""
    argmax: bool


def _batch(subject: Subject, rows: EvaluationRows, indices: range, *, argmax: bool) -> _Marked:
    """The rows as one micro-batch; those beyond the last repeat it and are not measured."""
    made = [rows.row(min(index, rows.number - 1)) for index in indices]
    marks = np.concatenate(
        [
            row.marks if index < rows.number else np.full(rows.length, -1)
            for index, row in zip(indices, made, strict=True)
        ]
    )
    whole = collate([row.segments for row in made], list(indices), seq_len=rows.length, pad_id=rows.pad_id)
    shard, device = (subject.topology.cp_rank, subject.topology.cp_size), subject.device.torch_device
    mine = zigzag(torch.from_numpy(marks)[None], *shard)[0]
    at = torch.nonzero(mine >= 0)[:, 0]
    return _Marked(whole.zigzag(*shard).to(device), at.to(device), mine[at].to(device), argmax)


def _forward_step(batches: Iterator[_Marked], model: nn.Module) -> tuple[Tensor, Any]:
    marked = next(batches)
    out = model(marked.batch, predict_at=marked.at if marked.argmax else None)
    return out, partial(_take, marked)


def _take(marked: _Marked, out: Tensor, non_loss_data: bool) -> tuple[Tensor, Tensor]:
    return marked.marks, out if marked.argmax else out.view(-1)[marked.at]


def summed_everywhere(mine: Tensor) -> Tensor:
    """Sum over data- and context-parallel ranks, then from the last pipeline stage to all."""
    from megatron.core import parallel_state

    torch.distributed.all_reduce(mine, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(mine, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return mine


@contextmanager
def _measuring(chunks: TrainableModel) -> Iterator[None]:
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()
