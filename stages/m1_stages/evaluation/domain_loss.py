"""Loss of held-out conversations by domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from m1_data.sft.dataset import SFTDataset
from m1_stages.evaluation.long_context import EvaluationRows, MarkedRow, Subject, forward_rows, summed_everywhere
from m1_stages.event_values import DomainLoss


def loss_by_domain(
    subject: Subject, rows: SFTDataset, *, tokens_at_once: int, check: Callable[[], None]
) -> list[DomainLoss]:
    """Mean loss of the trained tokens of the conversations that ``rows`` holds out, by domain; every rank calls it.

    Args:
        tokens_at_once: tokens of one forward pass.
        check: called between passes on every rank; whatever it raises ends the measurement.
    """
    names = rows.store.manifest.domains

    def row(index: int) -> MarkedRow:
        marks = np.full(rows.seq_len, -1, dtype=np.int64)
        segments, at = [], 0
        for number in rows.held_out[index]:
            segment = rows.segment(number)
            inside = marks[at : at + len(segment.tokens)]
            inside[segment.trained] = rows.store.samples["domain"][number]
            segments.append(segment)
            at += len(segment.tokens)
        return MarkedRow(segments, marks)

    made = EvaluationRows(
        number=len(rows.held_out), length=rows.seq_len, row=row, tokens_at_once=tokens_at_once, pad_id=rows.pad_id
    )
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=subject.device.torch_device)
    for marks, values in forward_rows(subject, made, check, argmax=False):
        sums.index_add_(0, marks, torch.stack([values.double(), torch.ones_like(values).double()], 1))
    conversations = Counter(
        int(rows.store.samples["domain"][number]) for samples in rows.held_out for number in samples
    )
    return [
        DomainLoss(domain=name, conversations=conversations[n], trained_tokens=int(tokens), loss=loss / tokens)
        for n, (name, (loss, tokens)) in enumerate(zip(names, summed_everywhere(sums).tolist(), strict=True))
        if tokens
    ]
