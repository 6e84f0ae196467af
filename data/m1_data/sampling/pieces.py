"""Documents of any length as pieces of at most a row, in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m1_data.arrays import Ints
from m1_data.seeded_random import derive_seed, permutation


@dataclass(frozen=True, slots=True)
class Pieces:
    """Contiguous parts of documents, as parallel int64 arrays."""

    cell: Ints
    document: Ints
    start: Ints
    """First token inside the document."""
    length: Ints

    def __len__(self) -> int:
        return len(self.length)

    def take(self, index: slice | npt.NDArray[Any]) -> Pieces:
        """Return the pieces at a slice, positions or a bool mask."""
        return Pieces(self.cell[index], self.document[index], self.start[index], self.length[index])

    @staticmethod
    def concat(parts: Sequence[Pieces]) -> Pieces:
        """Return all pieces of ``parts``, in order."""
        if not parts:
            empty = np.empty(0, dtype=np.int64)
            return Pieces(empty, empty, empty, empty)
        fields = ("cell", "document", "start", "length")
        return Pieces(*(np.concatenate([getattr(p, name) for p in parts]) for name in fields))


def cut(cell: int, documents: Ints, begins: Ints, ends: Ints, seq_len: int) -> Pieces:
    """Cut tokens ``begins`` to ``ends`` of each document into pieces of at most ``seq_len`` tokens, and return these.

    Where there are no tokens there is no piece.
    """
    counts = -(-(ends - begins) // seq_len)
    owner = np.repeat(np.arange(len(documents)), counts)
    first = np.cumsum(counts) - counts
    start = begins[owner] + (np.arange(len(owner)) - first[owner]) * seq_len
    return Pieces(
        np.full(len(owner), cell, dtype=np.int64),
        documents[owner],
        start.astype(np.int64),
        np.minimum(ends[owner] - start, seq_len),
    )


class CellStream:
    """The documents of one cell in a seeded order, epoch after epoch, each once an epoch, in pieces of at most a row."""

    def __init__(self, cell: int, lengths: Ints, seed: int, *, seq_len: int, whole: bool = False) -> None:
        self._cell, self._lengths, self._seed, self._seq_len, self._whole = cell, lengths, seed, seq_len, whole
        self._tokens = int(lengths.sum())
        self._epoch = -1
        self._order = self._ends = np.empty(0, dtype=np.int64)
        self._next = self._start = 0
        """Place in the order of the next document, and the first of its tokens that was not handed out."""
        self.taken = 0
        """Number of tokens handed out so far."""

    def take(self, target: float, limit: int) -> Pieces:
        """Hand out the next pieces as long as that brings ``taken`` nearer to ``target``, and never beyond ``limit``.

        A document that reaches over the limit is cut there; a stream of whole documents ends before it.
        """
        parts = []
        while self._tokens:
            if self._next == len(self._order):
                if min(target, limit) <= self.taken:
                    break
                self._epoch += 1
                self._order = permutation(len(self._lengths), derive_seed(self._seed, self._epoch))
                self._ends = np.cumsum(self._lengths[self._order])
                self._next = self._start = 0
            done = self._epoch * self._tokens
            stop, stop_at = self._stop(min(target, limit) - done, limit - done)
            documents = self._order[self._next : stop + (stop_at > 0)]
            begins, ends = np.zeros(len(documents), dtype=np.int64), self._lengths[documents]
            if len(documents):
                begins[0] = self._start
            if stop_at:
                ends[-1] = stop_at
            parts.append(cut(self._cell, documents, begins, ends, self._seq_len))
            self._next, self._start = stop, stop_at
            self.taken += int((ends - begins).sum())
            if stop < len(self._order):
                break
        return Pieces.concat(parts)

    def _stop(self, target: float, limit: int) -> tuple[int, int]:
        """Return where handing out ends in this epoch: a place in the order, and tokens of its document that are taken.

        Args:
            target: tokens since the beginning of the epoch; ``limit``, too.
        """
        at = max(self._next, int(np.searchsorted(self._ends, target, "right")))
        if at == len(self._order):
            return at, 0
        length = int(self._lengths[self._order[at]])
        begin = int(self._ends[at]) - length
        base = self._start if at == self._next else 0
        low = base + max(0, int((target - begin - base) // self._seq_len)) * self._seq_len
        high = min(low + self._seq_len, length, limit - begin)
        if high <= low or (low + high) / 2 > target - begin or (self._whole and high < length):
            return at, low
        return (at, high) if high < length else (at + 1, 0)
