"""Packed batches for tests of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from m1_data.sampling.loader import PackedBatch


def packed_batch(tokens: torch.Tensor, doc_lengths: Sequence[int]) -> PackedBatch:
    """``tokens`` [T] as one packed micro-batch of documents; the last token of each document has no label."""
    ends = torch.tensor(doc_lengths).cumsum(0)
    mask = torch.ones(len(tokens))
    mask[ends - 1] = 0.0
    return PackedBatch(
        tokens=tokens[None],
        labels=tokens.roll(-1)[None],
        loss_mask=mask[None],
        position_ids=torch.cat([torch.arange(n) for n in doc_lengths])[None],
        cu_seqlens=torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        doc_lengths=tuple(doc_lengths),
        sample_ids=(0,),
        trained_tokens=int(mask.sum()),
    )
