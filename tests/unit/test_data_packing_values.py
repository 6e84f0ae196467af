"""Packing by numbers: orders that every machine and version must repeat, small cases by hand, and the windows of a stage."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from m1_data.sampling.packing import CellStream, Pieces, RowPlanner, best_fit, cut
from m1_data.seeded_random import derive_seed, permutation, random_uint64
from m1_data.storage.cell import Cell

A, B = Cell("a", "code", "lt32k"), Cell("b", "stem", "lt32k")


def test_seeds_and_orders_are_the_same_for_ever() -> None:
    """Another number here would give every interrupted run another order of its data."""
    assert derive_seed(1234, "32k") == 15678641616464869539
    assert random_uint64(3, 0).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]  # splitmix64's own
    assert random_uint64(2, 2**64 - 1).tolist() == [16490336266968443936, 16834447057089888969]
    assert permutation(10, 7).tolist() == [1, 8, 5, 7, 0, 9, 4, 6, 3, 2]


def test_documents_are_cut_at_multiples_of_the_row() -> None:
    pieces = cut(3, np.array([7, 8, 9, 10]), np.array([0, 5, 4, 9]), 4)
    assert pieces.cell.tolist() == [3] * 6
    assert pieces.document.tolist() == [8, 8, 9, 10, 10, 10]
    assert pieces.start.tolist() == [0, 4, 0, 0, 4, 8]
    assert pieces.length.tolist() == [4, 1, 4, 4, 4, 1]


def test_best_fit_by_hand() -> None:
    """7 opens row 0, 6 row 1, 4 goes to row 1 (exactly full), the first 3 to row 0 (exactly full), the others to row 2."""
    rows, count = best_fit(np.array([3, 7, 3, 6, 3, 4]), 10)
    assert (rows.tolist(), count) == ([0, 0, 2, 1, 2, 1], 3)
    rows, count = best_fit(np.array([5, 5, 5, 1]), 10)
    assert (rows.tolist(), count) == ([0, 0, 1, 1], 2), (
        "a full row takes nothing, pieces of equal length keep their order"
    )
    assert best_fit(np.empty(0, dtype=np.int64), 10)[1] == 0


def test_pieces_are_joined_in_order() -> None:
    one, two = (cut(cell, np.array([cell]), np.array([5]), 4) for cell in (0, 1))
    joined = Pieces.concat([one, two])
    assert (len(joined), joined.cell.tolist(), joined.length.tolist()) == (4, [0, 0, 1, 1], [4, 1, 4, 1])
    assert joined.take(slice(1, 3)).start.tolist() == [4, 0]
    assert len(Pieces.concat([])) == 0


def test_a_stream_hands_out_whole_documents_up_to_what_was_asked() -> None:
    stream = CellStream(0, np.full(4, 10), seed=1)
    assert [len(stream.take(upto, 32)) for upto in (0, 1, 10, 10.5, 20, 40)] == [0, 1, 0, 1, 0, 2]
    assert stream.taken == 40
    assert (len(stream.take(85, 32)), stream.taken) == (5, 90), "an epoch ends inside"
    assert (len(stream.take(80, 32)), stream.taken) == (0, 90), "less than was handed out"
    assert len(CellStream(0, np.array([0, 0]), seed=1).take(5, 32)) == 0, "a cell of empty documents has nothing"


@pytest.mark.parametrize(
    ("num_rows", "window"),
    [(1, 1), (16, 16), (40, 16), (320, 16), (321, 17), (400, 20), (20_480, 1024), (30_000, 1024)],
)
def test_windows_of_a_stage(num_rows: int, window: int) -> None:
    """A twentieth of the stage, 16 to 1024 rows; shares are asked for at the progress of each window's first row."""
    asked: list[float] = []

    def shares(progress: float) -> dict[Cell, float]:
        asked.append(progress)
        return {A: 1.0}

    plan = RowPlanner({A: np.full(50, 4)}, shares, seed=1, seq_len=4, num_rows=num_rows)
    plan.row(0)
    assert asked == [0.0]
    plan.row(min(window, num_rows) - 1)
    assert asked == [0.0]
    if num_rows > window:
        plan.row(window)
        assert asked == [0.0, pytest.approx(window / (num_rows - 1), rel=1e-12)]


def test_rows_of_a_stage_are_the_same_for_ever() -> None:
    """All rows of three windows, with documents that are cut, put off and repeated."""
    lengths = {A: np.arange(1, 60), B: (np.arange(1, 40) * 7) % 50}
    plan = RowPlanner(lengths, lambda p: {A: 0.25 + p / 2, B: 0.75 - p / 2}, seed=5, seq_len=32, num_rows=40)
    rows = [plan.row(index) for index in range(40)]
    text = repr([[part.tolist() for part in (r.cell, r.document, r.start, r.length)] for r in rows])
    assert [sum(r.length.tolist()) for r in rows].count(32) == 34
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "02375fd1abf193a0cefc1e812593c675af424c3cb4fa65c8267069f66115a5b3"
    )


def test_shares_move_through_the_stage() -> None:
    """Windows take what the shares at their beginning say: a tenth of the tokens at first, nine tenths at the end."""
    lengths = {A: np.full(4000, 4), B: np.full(4000, 4)}
    plan = RowPlanner(lengths, lambda p: {A: 0.1 + 0.8 * p, B: 0.9 - 0.8 * p}, seed=1, seq_len=32, num_rows=400)
    share = [float(np.mean(np.concatenate([plan.row(20 * w + r).cell == 0 for r in range(20)]))) for w in range(20)]
    assert share == pytest.approx([0.1 + 0.8 * 20 * w / 399 for w in range(20)], abs=0.02)


def test_what_was_put_off_comes_first_in_the_next_window() -> None:
    """Pieces of 3 in rows of 4 leave a quarter free; a window's rows are full, and what is left is trained in the next."""
    plan = RowPlanner({A: np.full(64, 3)}, lambda _: {A: 1.0}, seed=1, seq_len=4, num_rows=48)
    seen = [plan.row(index).document.tolist() for index in range(48)]
    assert [len(documents) for documents in seen] == [1] * 48
    assert len({documents[0] for documents in seen}) == 48, "each document once before any is repeated"
