"""The layout of packed documents in chunks, for the chunked backend.

Every document starts a chunk of its own, so no chunk ever holds two documents. Chunks are ordered by their rank inside
the document (all first chunks, then all second ones, ...), documents longest first: the documents that still have a
chunk at rank r are then a prefix, and one recurrence step for all documents is a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Index tensors of one packing; built once per packing and device."""

    chunk: int
    """Tokens of a full chunk."""
    gather: Tensor
    """[num_chunks * chunk] int64: token of each slot, or num_tokens for padding."""
    scatter: Tensor
    """[num_tokens] int64: slot of each token."""
    lengths: Tensor
    """[num_chunks] int64: tokens in each chunk."""
    order: Tensor
    """[num_documents] int64: document of each column, longest first."""
    last: Tensor
    """[num_documents] int64: last chunk of each document, in document order."""
    offsets: tuple[int, ...]
    """Start of each rank's chunks."""
    widths: tuple[int, ...]
    """Number of documents that reach each rank."""


@lru_cache(maxsize=16)
def chunk_layout(doc_lengths: tuple[int, ...], chunk: int, device: torch.device) -> ChunkLayout:
    """Lay documents of ``doc_lengths`` tokens (each >= 1) out into chunks of ``chunk`` tokens."""
    lengths = torch.tensor(doc_lengths, dtype=torch.int64)
    starts = torch.cumsum(lengths, 0) - lengths
    total = int(lengths.sum())
    counts = (lengths + chunk - 1) // chunk
    order = torch.argsort(counts, descending=True, stable=True)
    column = torch.empty_like(order)
    column[order] = torch.arange(len(order))
    widths = _widths(counts[order])
    rank_offset = torch.cumsum(widths, 0) - widths

    doc_of_token = torch.repeat_interleave(torch.arange(len(doc_lengths)), lengths)
    position = torch.arange(total) - starts[doc_of_token]
    chunk_of_token = rank_offset[position // chunk] + column[doc_of_token]
    scatter = chunk_of_token * chunk + position % chunk
    num_chunks = int(widths.sum())
    gather = torch.full((num_chunks * chunk,), total, dtype=torch.int64)
    gather[scatter] = torch.arange(total)
    sizes = torch.zeros(num_chunks, dtype=torch.int64).index_add_(0, chunk_of_token, torch.ones_like(chunk_of_token))
    return ChunkLayout(
        chunk=chunk,
        gather=gather.to(device),
        scatter=scatter.to(device),
        lengths=sizes.to(device),
        order=order.to(device),
        last=(rank_offset[counts - 1] + column).to(device),
        offsets=tuple(rank_offset.tolist()),
        widths=tuple(widths.tolist()),
    )


def _widths(counts_descending: Tensor) -> Tensor:
    """The number of documents that have a chunk of each rank."""
    ranks = torch.arange(int(counts_descending[0]))
    return torch.searchsorted(-counts_descending, -ranks, right=False).clamp(min=0) if len(ranks) else ranks


def doc_lengths_of(q: Tensor, cu_seqlens: Tensor | None, doc_lengths: Sequence[int] | None) -> tuple[int, ...]:
    """Check the documents and return their lengths on the host. A GPU's ``cu_seqlens`` is read only without ``doc_lengths``.

    Raises:
        TypeError: ``cu_seqlens`` is not of integers.
        ValueError: the documents do not tile q's tokens, or q has more than one row of them.
    """
    batch, tokens = q.shape[:2]
    if batch != 1 and (cu_seqlens is not None or doc_lengths is not None):
        raise ValueError(f"cu_seqlens and doc_lengths need a batch of 1, not {batch}")
    if cu_seqlens is not None and cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}, not int32 or int64")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 2):
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)}, not [documents + 1]")
    if doc_lengths is not None:
        name, lengths = "doc_lengths", tuple(doc_lengths)
        if cu_seqlens is not None and len(cu_seqlens) != len(lengths) + 1:
            raise ValueError(f"cu_seqlens has {len(cu_seqlens)} edges, doc_lengths {len(lengths)} documents")
    elif cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        if edges[0] != 0:
            raise ValueError(f"cu_seqlens starts at {edges[0]}, not 0")
        name, lengths = "cu_seqlens", tuple(b - a for a, b in pairwise(edges))
    else:
        name, lengths = "q", (tokens,) * batch
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{name} has a document without tokens")
    if sum(lengths) != batch * tokens:
        raise ValueError(f"{name} covers {sum(lengths)} tokens, q has {tokens}")
    return lengths
