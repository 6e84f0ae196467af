"""Rows of exactly ``seq_len`` tokens out of documents of any length, in an order fixed by seed and stage.

Every cell has a quota of the stage's tokens and gives its documents in a seeded order, documents longer than a row in row-sized
pieces; the last document is cut where the quota ends, so that few long documents are drawn no more often than planned. Rows are
planned window by window. A window takes pieces until each cell has given its part of the stage so far, to the nearest piece;
packs them by best-fit decreasing; and shuffles the rows. What does not fill the window's rows moves to the head of the next
window, so nothing is lost or repeated. Nothing here depends on the number of processes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from m1_data.arrays import Ints
from m1_data.sampling.pieces import CellStream, Pieces
from m1_data.seeded_random import derive_seed, permutation
from m1_data.storage.cell import Cell

MAX_WINDOW_ROWS = 1024
MIN_WINDOW_ROWS = 16
WINDOWS_PER_STAGE = 20
SPARE_ROWS = 1
"""Rows of pieces that a window has more than it needs, so that the fullest ones can be chosen."""


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


class Quotas(Protocol):
    """The tokens that a stage draws of each cell, and when; ``m1_data.sampling.mix.MixPlan`` is one."""

    @property
    def quotas(self) -> Mapping[Cell, int]:
        """Tokens per cell; they sum to the tokens of the stage's rows."""
        ...

    @property
    def limits(self) -> Mapping[Cell, int]:
        """Tokens per cell at most, where whole documents leave a part of their quota to others."""
        ...

    @property
    def whole(self) -> frozenset[Cell]:
        """Cells whose documents are never cut."""
        ...

    def tokens_by(self, progress: float, /) -> Mapping[Cell, float]:
        """Return the tokens per cell of the first ``progress`` (0 to 1) of the stage."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive rows that are planned together."""

    first_row: int
    pieces: Pieces
    bounds: Ints
    """Pieces of row r of the window: ``bounds[r]`` to ``bounds[r + 1]``."""


class RowPlanner:
    """Plans which pieces make up row i, as far as asked and no further.

    Planning row i costs the planning of all rows before it: about a second for a million documents.

    Args:
        lengths: document lengths in tokens per cell, in the order that numbers the cells.
        plan: what the stage draws of each cell.
        seed: anything that names the stage's order, e.g. ``derive_seed(run_seed, stage)``.
        num_rows: rows of the stage; the progress at a row is its number divided by this.
    """

    def __init__(self, lengths: Mapping[Cell, Ints], plan: Quotas, *, seed: int, seq_len: int, num_rows: int) -> None:
        self._cells = list(lengths)
        self._streams = [
            CellStream(
                i,
                np.asarray(lengths[c], dtype=np.int64),
                derive_seed(seed, *c),
                seq_len=seq_len,
                whole=c in plan.whole,
            )
            for i, c in enumerate(self._cells)
        ]
        self._plan, self._seed, self._seq_len, self._num_rows = plan, seed, seq_len, num_rows
        self._window_rows = min(MAX_WINDOW_ROWS, max(MIN_WINDOW_ROWS, -(-num_rows // WINDOWS_PER_STAGE)))
        self._carried = Pieces.concat([])
        self._planned = 0
        self._windows: list[Window] = []

    def row(self, index: int) -> Pieces:
        """Return the pieces of row ``index`` (below ``num_rows``), in their order inside the row."""
        while index >= self._planned:
            self._windows.append(self.next_window())
        at = bisect_left(self._windows, index + 1, key=lambda w: w.first_row) - 1
        window = self._windows[at]
        r = index - window.first_row
        return window.pieces.take(slice(window.bounds[r], window.bounds[r + 1]))

    def drawn(self, *, without: Collection[int] = ()) -> dict[Cell, int]:
        """Return the tokens of each cell in all rows of the stage but those named in ``without``."""
        if self._num_rows:
            self.row(self._num_rows - 1)
        tokens = sum(
            (self._tokens(window.pieces) for window in self._windows), np.zeros(len(self._cells), dtype=np.int64)
        )
        for index in without:
            tokens = tokens - self._tokens(self.row(index))
        return dict(zip(self._cells, tokens.tolist(), strict=True))

    def count(self) -> dict[Cell, int]:
        """Return what ``drawn`` does for all rows, of a planner that gave no row yet, without keeping the windows."""
        tokens = np.zeros(len(self._cells), dtype=np.int64)
        while self._planned < self._num_rows:
            tokens += self._tokens(self.next_window().pieces)
        return dict(zip(self._cells, tokens.tolist(), strict=True))

    def _tokens(self, pieces: Pieces) -> Ints:
        return np.bincount(pieces.cell, pieces.length, len(self._cells)).astype(np.int64)

    def next_window(self) -> Window:
        """Plan and return the rows that follow those planned so far; ``row`` would not find them again."""
        window_rows = min(self._window_rows, self._num_rows - self._planned)
        room = window_rows * self._seq_len - int(self._carried.length.sum())
        pieces = Pieces.concat([self._carried, *self._hand_out(room, self._planned + window_rows)])
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
        window = Window(self._planned, pieces.take(chosen), bounds)
        self._planned += len(kept)
        return window

    def _hand_out(self, room: int, end: int) -> list[Pieces]:
        """Take at least ``room`` tokens from the streams, so that each has given its part of the stage up to row ``end``."""
        if room <= 0:
            return []
        path = self._plan.tokens_by(end / self._num_rows)
        total = sum(path.values())
        needed = room + sum(stream.taken for stream in self._streams)
        parts, more, short = [], float(SPARE_ROWS * self._seq_len), room
        while short > 0:
            scale = (needed + more) / total
            exhausted = True
            for cell, stream in zip(self._cells, self._streams, strict=True):
                quota, share = self._plan.quotas.get(cell, 0), path.get(cell, 0.0)
                limit = self._plan.limits[cell] if cell in self._plan.whole else quota
                parts.append(stream.take(min(scale * share, quota), limit))
                exhausted = exhausted and (scale * share >= quota or not share)
            short = needed - sum(stream.taken for stream in self._streams)
            if exhausted:
                break
            more = max(2 * more, short)  # pieces are indivisible: ask for more until enough have come
        for cell, stream in zip(self._cells, self._streams, strict=True):  # what whole documents left of their quota
            if short > 0 and cell not in self._plan.whole:
                limit = min(self._plan.limits.get(cell, 0), stream.taken + short)
                parts.append(stream.take(limit, limit))
                short = needed - sum(s.taken for s in self._streams)
        return parts
