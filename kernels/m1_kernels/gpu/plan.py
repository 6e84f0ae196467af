"""Where a packing is cut: documents into segments, one program each; segments into pieces for their end states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK_TOKENS = 128  # every cut is a multiple of this from its document's start
MIN_SEGMENT_TOKENS, MIN_PIECE_TOKENS = 512, 2048
MAX_PIECE_STATES = 4096  # of 128 x 128 fp32: 256 MiB
WELL_FILLED = 0.95  # share of the device's slots that one document's programs take in their last wave


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Tables of one packing on one device, int32; built once per packing."""

    segments: Tensor
    """[segments, 6]: start token, tokens, first piece, pieces, state row forward in time, backward in time (-1: none)."""
    order: Tensor
    """[segments]: the segments, longest first, so that the last programs to start are short."""
    pieces: Tensor
    """[pieces, 4]: start token, tokens, tokens of its segment after it, before it."""
    chains: Tensor
    """[documents whose states are combined, 3]: first segment, end, document."""
    documents: int
    inner: int
    """Segments that continue a document: rows of entering states when there are no initial ones."""


def segment_tokens(tokens: int, documents: int, heads: int, slots: int) -> int:
    """Longest segment that still fills ``slots`` programs at a time, one program per segment and head.

    Long segments keep the states' share small. One document: as few waves of programs as leave no slot empty. Several:
    four waves, so that unequal documents even out.
    """
    if documents > 1:
        count = 4 * slots // heads
    else:
        counts = [(waves, waves * slots // heads) for waves in range(1, 9)]
        filled = [n * heads / (waves * slots) for waves, n in counts]
        well = next((i for i, share in enumerate(filled) if share >= WELL_FILLED), filled.index(max(filled)))
        count = counts[well][1]
    return max(MIN_SEGMENT_TOKENS, -(-tokens // max(1, count)))


def _cut(length: int, limit: int) -> list[int]:
    """Equal parts of about ``limit`` tokens at most, all but the last of whole chunks."""
    parts = max(1, -(-length // limit))
    size = -(-length // parts)
    size = -(-size // CHUNK_TOKENS) * CHUNK_TOKENS
    return [min(size, length - at) for at in range(0, length, size)]


@lru_cache(maxsize=32)
def segment_plan(
    doc_lengths: tuple[int, ...], heads: int, slots: int, device: torch.device, all_states: bool
) -> SegmentPlan:
    """Cut documents for ``heads`` heads and a device that runs ``slots`` programs at once.

    ``all_states``: the state that leaves every document is wanted too, not only those between segments.
    """
    total = sum(doc_lengths)
    limit = segment_tokens(total, len(doc_lengths), heads, slots)
    piece_limit = max(MIN_PIECE_TOKENS, -(-total * heads // MAX_PIECE_STATES))
    segments: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    chains: list[tuple[int, ...]] = []
    at = inner = 0
    for doc, length in enumerate(doc_lengths):
        cuts = _cut(length, limit)
        if len(cuts) > 1 or all_states:
            chains.append((len(segments), len(segments) + len(cuts), doc))
        for n, segment in enumerate(cuts):
            parts = _cut(segment, piece_limit) if len(cuts) > 1 or all_states else []
            forward = inner + n - 1 if n else -1
            backward = inner + n if n + 1 < len(cuts) else -1
            segments.append((at, segment, len(pieces), len(parts), forward, backward))
            done = 0
            for part in parts:
                pieces.append((at + done, part, segment - done - part, done))
                done += part
            at += segment
        inner += len(cuts) - 1

    def table(rows: list, width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, width).to(device)

    return SegmentPlan(
        segments=table(segments, 6),
        order=table(sorted(range(len(segments)), key=lambda n: -segments[n][1]), 1)[:, 0],
        pieces=table(pieces, 4),
        chains=table(chains, 3),
        documents=len(doc_lengths),
        inner=inner,
    )
