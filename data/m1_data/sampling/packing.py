"""Rows of exactly ``seq_len`` tokens out of documents of any length, in an order fixed by seed and stage.

Rows are planned window by window. A window takes whole documents, cell by cell in a seeded order, until each cell has
its share of the window's tokens; cuts documents longer than a row into row-sized pieces; packs the pieces by best-fit
decreasing; and shuffles the rows. What does not fill the window's rows moves to the head of the next window, so nothing
is lost or repeated. Nothing here depends on the number of processes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m1_data.arrays import Ints
from m1_data.seeded_random import derive_seed, permutation
from m1_data.storage.cell import Cell

MAX_WINDOW_ROWS = 1024
MIN_WINDOW_ROWS = 16
WINDOWS_PER_STAGE = 20


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


def cut(cell: int, documents: Ints, lengths: Ints, seq_len: int) -> Pieces:
    """Cut documents into pieces of at most ``seq_len`` tokens and return these; empty documents have none."""
    counts = -(-lengths // seq_len)
    owner = np.repeat(np.arange(len(documents)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(owner)) - first[owner]) * seq_len
    return Pieces(
        np.full(len(owner), cell, dtype=np.int64),
        documents[owner],
        start.astype(np.int64),
        np.minimum(lengths[owner] - start, seq_len),
    )


def best_fit(lengths: Ints, seq_len: int) -> tuple[Ints, int]:
    """Assign pieces to rows by best-fit decreasing: each, longest first, goes where it leaves the least space.

    Returns:
        The row of each piece, int64 ``[n]``, and the number of rows. Pieces of equal length keep their order.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    # One sorted integer list stands for all open rows: free space in the high part, row number in the low part.
    unit = len(lengths) + 1
    open_rows: list[int] = []
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    placed = []
    for length in lengths[order].tolist():
        need = length * unit
        at = bisect_left(open_rows, need)
        if at == len(open_rows):
            entry = seq_len * unit + opened
            opened += 1
        else:
            entry = open_rows.pop(at)
        placed.append(entry % unit)
        entry -= need
        if entry >= unit:
            insort(open_rows, entry)
    rows[order] = placed
    return rows, opened


class CellStream:
    """The documents of one cell in a seeded order, epoch after epoch, each once an epoch."""

    def __init__(self, cell: int, lengths: Ints, seed: int) -> None:
        self._cell, self._lengths, self._seed = cell, lengths, seed
        self._tokens = int(lengths.sum())
        self._epoch = -1
        self._order = self._ends = np.empty(0, dtype=np.int64)
        self._next = 0
        self.taken = 0
        """Number of tokens handed out so far."""

    def take(self, upto: float, seq_len: int) -> Pieces:
        """Hand out whole documents until at least ``upto`` tokens have been handed out since the beginning."""
        parts = []
        while self.taken < upto and self._tokens:
            if self._next == len(self._order):
                self._epoch += 1
                self._order = permutation(len(self._lengths), derive_seed(self._seed, self._epoch))
                self._ends = np.cumsum(self._lengths[self._order])
                self._next = 0
            done = self._epoch * self._tokens
            stop = min(int(np.searchsorted(self._ends, upto - done)) + 1, len(self._order))
            documents = self._order[self._next : stop]
            parts.append(cut(self._cell, documents, self._lengths[documents], seq_len))
            self._next, self.taken = stop, done + int(self._ends[stop - 1])
        return Pieces.concat(parts)


@dataclass(frozen=True, slots=True)
class _Window:
    first_row: int
    pieces: Pieces
    bounds: Ints
    """Pieces of row r of the window: ``bounds[r]`` to ``bounds[r + 1]``."""


class RowPlanner:
    """Plans which pieces make up row i, as far as asked and no further.

    Planning row i costs the planning of all rows before it: about a second for a million documents.

    Args:
        lengths: document lengths in tokens per cell, in the order that numbers the cells.
        shares: token share per cell at a progress of 0 to 1 through the stage.
        seed: anything that names the stage's order, e.g. ``derive_seed(run_seed, stage)``.
        num_rows: rows of the stage; the progress of a row is its number divided by this.
    """

    def __init__(
        self,
        lengths: Mapping[Cell, Ints],
        shares: Callable[[float], Mapping[Cell, float]],
        *,
        seed: int,
        seq_len: int,
        num_rows: int,
    ) -> None:
        self._cells = list(lengths)
        self._streams = [
            CellStream(i, np.asarray(lengths[c], dtype=np.int64), derive_seed(seed, *c))
            for i, c in enumerate(self._cells)
        ]
        self._shares, self._seed, self._seq_len, self._num_rows = shares, seed, seq_len, num_rows
        self._target = [0.0] * len(self._cells)
        self._window_rows = min(MAX_WINDOW_ROWS, max(MIN_WINDOW_ROWS, -(-num_rows // WINDOWS_PER_STAGE)))
        self._carried = Pieces.concat([])
        self._windows: list[_Window] = []
        self._planned = 0

    def row(self, index: int) -> Pieces:
        """Return the pieces of row ``index`` (below ``num_rows``), in their order inside the row."""
        while index >= self._planned:
            self._plan_window()
        at = bisect_left(self._windows, index + 1, key=lambda w: w.first_row) - 1
        window = self._windows[at]
        r = index - window.first_row
        return window.pieces.take(slice(window.bounds[r], window.bounds[r + 1]))

    def _plan_window(self) -> None:
        progress = min(1.0, self._planned / max(1, self._num_rows - 1))
        window_rows = min(self._window_rows, self._num_rows - self._planned)
        room = max(0, window_rows * self._seq_len - int(self._carried.length.sum()))
        shares = self._shares(progress)
        parts = [self._carried]
        for i, cell in enumerate(self._cells):
            self._target[i] += shares.get(cell, 0.0) * room
            parts.append(self._streams[i].take(self._target[i], self._seq_len))
        pieces = Pieces.concat(parts)
        rows, count = best_fit(pieces.length, self._seq_len)
        fill = np.bincount(rows, pieces.length, count)
        waited = np.bincount(rows, np.arange(len(pieces)) < len(self._carried), count) > 0
        # Whatever was put off once goes first, then the fullest rows; the rest is put off to the next window.
        ranked = np.lexsort((-fill, ~waited))
        kept, late = ranked[:window_rows], ranked[window_rows:]
        kept = kept[permutation(len(kept), derive_seed(self._seed, "rows", self._planned))]
        place = np.full(count, -1, dtype=np.int64)
        place[kept] = np.arange(len(kept))
        self._carried = pieces.take(np.isin(rows, late))
        chosen = np.flatnonzero(place[rows] >= 0)
        tie = permutation(len(chosen), derive_seed(self._seed, "pieces", self._planned))
        chosen = chosen[np.lexsort((tie, place[rows[chosen]]))]
        bounds = np.searchsorted(place[rows[chosen]], np.arange(len(kept) + 1))
        self._windows.append(_Window(self._planned, pieces.take(chosen), bounds))
        self._planned += len(kept)
