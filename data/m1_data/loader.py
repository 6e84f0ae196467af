"""Packed rows as torch batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """A micro-batch: rows concatenated into one sequence of T tokens, documents isolated by ``cu_seqlens``."""

    tokens: Tensor
    """[1, T] int64."""
    labels: Tensor
    """[1, T] int64: the next token of the same document; 0 where ``loss_mask`` is 0."""
    loss_mask: Tensor
    """[1, T] fp32, 1 where a label exists."""
    position_ids: Tensor
    """[1, T] int64, restarting with every document (and with every piece of a cut one)."""
    cu_seqlens: Tensor
    """[documents + 1] int32 edges, padding included as documents of its own."""
    doc_lengths: tuple[int, ...]
    """The same edges as host-side lengths."""
    sample_ids: tuple[int, ...]
    """Rows in the batch."""
    trained_tokens: int
    """Sum of ``loss_mask``."""

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the tensors to ``device``."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)
