"""Packed batches for tests of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from m1_data.sampling.loader import PackedBatch


def packed_batch(
    tokens: torch.Tensor,
    doc_lengths: Sequence[int],
    *,
    loss_mask: torch.Tensor | None = None,
    sample_ids: Sequence[int] = (0,),
) -> PackedBatch:
    """Return ``tokens`` [T] as one packed micro-batch of documents.

    Args:
        loss_mask: [T]; None: every token but the last of each document has a label.
    """
    edges = [0, *accumulate(doc_lengths)]
    if loss_mask is None:
        loss_mask = torch.ones(len(tokens))
        loss_mask[torch.tensor(edges[1:]) - 1] = 0.0
    return PackedBatch(
        tokens=tokens[None],
        labels=tokens.roll(-1)[None],
        loss_mask=loss_mask[None],
        position_ids=torch.cat([torch.arange(n) for n in doc_lengths])[None],
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        doc_lengths=tuple(doc_lengths),
        sample_ids=tuple(sample_ids),
        trained_tokens=int(loss_mask.sum()),
    )
