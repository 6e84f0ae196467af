"""The cuts of a packing: documents into segments, one program each; segments into pieces for their end states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from m1_kernels.lightning.cp_states import ShardCut

CHUNK_TOKENS = 128  # every cut is a multiple of this from its document's start
MIN_SEGMENT_TOKENS, MIN_PIECE_TOKENS = 512, 2048
MAX_PIECE_STATES = 4096  # of 128 x 128 fp32: 256 MiB
WELL_FILLED = 0.95  # share of the device's slots that one document's programs take in their last wave


@dataclass(frozen=True, slots=True)
class Carry:
    """The states that one shard of a sharded sequence receives and sends, in one direction of time."""

    sends: int
    """Row of final states that leaves the shard, or -1."""
    rows: slice
    """Rows of entering states that the state from outside reaches; empty if there is none."""
    distance: Tensor
    """[rows] int32 tokens from the shard's edge to each of these segments."""


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Tables of one packing on one device, int32; built once per packing."""

    segments: Tensor
    """[segments, 6]: start token, tokens, first piece, pieces, state row forward in time, backward in time (-1: zeros)."""
    order: Tensor
    """[segments]: the segments, longest first, so that the last programs to start are short."""
    pieces: Tensor
    """[pieces, 4]: start token, tokens, tokens of its segment after it, before it."""
    chains: Tensor
    """[documents whose states are combined, 3]: first segment, end, own number: that document's row of final states."""
    rows: int
    """Rows of entering states when there are no initial ones: the segments that continue a document."""
    carried: tuple[tuple[Carry, ...], tuple[Carry, ...]]
    """The states that cross to and from other ranks, forward and backward in time, in order of the shards."""


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
    doc_lengths: tuple[int, ...],
    heads: int,
    slots: int,
    device: torch.device,
    all_states: bool,
    cuts: tuple[ShardCut, ...] = (),
) -> SegmentPlan:
    """Cut documents for ``heads`` heads and a device that runs ``slots`` programs at once.

    Args:
        all_states: the state that leaves every document is wanted too, not only those between segments.
        cuts: of the shards that ``doc_lengths`` consists of, where the first or last documents go on in other shards.
    """
    total = sum(doc_lengths)
    limit = segment_tokens(total, len(doc_lengths), heads, slots)
    piece_limit = max(MIN_PIECE_TOKENS, -(-total * heads // MAX_PIECE_STATES))
    firsts = list(accumulate((len(cut.doc_lengths) for cut in cuts), initial=0))
    comes = {doc for doc, cut in zip(firsts, cuts, strict=False) if cut.from_previous}
    goes = {end - 1 for end, cut in zip(firsts[1:], cuts, strict=True) if cut.into_next}
    segments: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    chains: list[tuple[int, ...]] = []
    chain_of: dict[int, int] = {}
    rows_of: dict[int, tuple[slice, slice]] = {}
    at = forward = backward = 0
    for doc, length in enumerate(doc_lengths):
        parts = _cut(length, limit)
        last, crosses = len(parts) - 1, doc in comes or doc in goes
        if last or all_states or crosses:
            chain_of[doc] = len(chains)
            chains.append((len(segments), len(segments) + len(parts), len(chains)))
        rows_of[doc] = slice(forward, forward + last + 1), slice(backward, backward + last + 1)
        for n, segment in enumerate(parts):
            split = _cut(segment, piece_limit) if last or all_states or crosses else []
            to = from_ = -1
            if n or doc in comes:
                to, forward = forward, forward + 1
            if n < last or doc in goes:
                from_, backward = backward, backward + 1
            segments.append((at, segment, len(pieces), len(split), to, from_))
            done = 0
            for part in split:
                pieces.append((at + done, part, segment - done - part, done))
                done += part
            at += segment

    def table(rows: list, width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, width).to(device)

    def carry(shard: int, reverse: bool) -> Carry:
        """The shard takes from outside at its first document, sends from its last; backward in time the other way."""
        cut, first, last = cuts[shard], firsts[shard], firsts[shard + 1] - 1
        takes, sends = (cut.into_next, cut.from_previous) if reverse else (cut.from_previous, cut.into_next)
        enters, leaves = (last, first) if reverse else (first, last)
        lengths = _cut(doc_lengths[enters], limit)
        before = list(accumulate(lengths[::-1] if reverse else lengths, initial=0))[:-1]
        distance = torch.tensor(before[::-1] if reverse else before, dtype=torch.int32)
        return Carry(
            sends=chain_of[leaves] if sends else -1,
            rows=rows_of[enters][reverse] if takes else slice(0),
            distance=(distance if takes else distance[:0]).to(device),
        )

    return SegmentPlan(
        segments=table(segments, 6),
        order=table(sorted(range(len(segments)), key=lambda n: -segments[n][1]), 1)[:, 0],
        pieces=table(pieces, 4),
        chains=table(chains, 3),
        rows=max(forward, backward),
        carried=(
            tuple(carry(n, False) for n in range(len(cuts))),
            tuple(carry(n, True) for n in range(len(cuts))),
        ),
    )
