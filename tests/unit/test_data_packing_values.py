"""Packing by numbers: orders that every machine and version must repeat, small cases by hand, and the windows of a stage."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from support.quotas import LinearQuotas, constant

from m1_data.sampling.packing import RowPlanner, best_fit
from m1_data.sampling.pieces import CellStream, Pieces, cut
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
    pieces = cut(3, np.array([7, 8, 9, 10]), np.zeros(4, dtype=np.int64), np.array([0, 5, 4, 9]), 4)
    assert pieces.cell.tolist() == [3] * 6
    assert pieces.document.tolist() == [8, 8, 9, 10, 10, 10]
    assert pieces.start.tolist() == [0, 4, 0, 0, 4, 8]
    assert pieces.length.tolist() == [4, 1, 4, 4, 4, 1]
    middle = cut(3, np.array([7, 8]), np.array([2, 0]), np.array([9, 6]), 4)
    assert (middle.start.tolist(), middle.length.tolist()) == ([2, 6, 0, 4], [4, 3, 4, 2])


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
    one, two = (cut(cell, np.array([cell]), np.array([0]), np.array([5]), 4) for cell in (0, 1))
    joined = Pieces.concat([one, two])
    assert (len(joined), joined.cell.tolist(), joined.length.tolist()) == (4, [0, 0, 1, 1], [4, 1, 4, 1])
    assert joined.take(slice(1, 3)).start.tolist() == [4, 0]
    assert len(Pieces.concat([])) == 0


def test_a_stream_hands_out_documents_to_the_nearest_and_is_cut_at_its_limit() -> None:
    stream = CellStream(0, np.full(4, 10), seed=1, seq_len=32)
    assert [len(stream.take(target, 1000)) for target in (0, 4.9, 5, 14, 20, 40)] == [0, 0, 1, 0, 1, 2]
    assert stream.taken == 40
    assert (len(stream.take(85, 1000)), stream.taken) == (5, 90), "an epoch ends inside"
    assert (len(stream.take(80, 1000)), stream.taken) == (0, 90), "less than was handed out"
    assert (stream.take(200, 93).length.tolist(), stream.taken) == ([3], 93)
    assert (stream.take(200, 200).length.tolist()[:2], stream.taken) == ([7, 10], 200), "and goes on from there"
    empty = CellStream(0, np.array([0, 0]), seed=1, seq_len=32)
    assert len(empty.take(5, 5)) == 0, "a cell of empty documents has nothing"


def test_a_long_document_is_handed_out_row_by_row() -> None:
    stream = CellStream(0, np.array([100]), seed=1, seq_len=32)
    assert stream.take(40, 1000).start.tolist() == [0]
    assert stream.take(90, 1000).start.tolist() == [32, 64]
    assert (stream.take(99, 1000).length.tolist(), stream.taken) == ([4], 100)
    whole = CellStream(0, np.array([30]), seed=1, seq_len=32, whole=True)
    assert (len(whole.take(59, 59)), whole.taken) == (1, 30), "the second pass does not fit"


@pytest.mark.parametrize(
    ("num_rows", "window"),
    [(1, 1), (16, 16), (40, 16), (320, 16), (321, 17), (400, 20), (20_480, 1024), (30_000, 1024)],
)
def test_windows_of_a_stage(num_rows: int, window: int) -> None:
    """A twentieth of the stage, 16 to 1024 rows; each gives the tokens that the stage gives up to the window's last row."""
    asked: list[float] = []

    class Asked(LinearQuotas):
        def tokens_by(self, progress: float) -> dict[Cell, float]:
            asked.append(progress)
            return super().tokens_by(progress)

    plan = RowPlanner(
        {A: np.full(50, 4)}, Asked(4 * num_rows, {A: 1.0}, {A: 1.0}), seed=1, seq_len=4, num_rows=num_rows
    )
    at = [min(window, num_rows) / num_rows, min(2 * window, num_rows) / num_rows]
    plan.row(0)
    assert set(asked) - {1.0} == set(at[:1]) - {1.0}
    plan.row(min(window, num_rows) - 1)
    assert set(asked) - {1.0} == set(at[:1]) - {1.0}
    if num_rows > window:
        plan.row(window)
        assert set(asked) - {1.0} == set(at) - {1.0}


def test_rows_of_a_stage_are_the_same_for_ever() -> None:
    """All rows of three windows, with documents that are cut, put off and repeated."""
    lengths = {A: np.arange(1, 60), B: (np.arange(1, 40) * 7) % 50}
    quotas = LinearQuotas(40 * 32, {A: 0.25, B: 0.75}, {A: 0.75, B: 0.25})
    plan = RowPlanner(lengths, quotas, seed=5, seq_len=32, num_rows=40)
    rows = [plan.row(index) for index in range(40)]
    text = repr([[part.tolist() for part in (r.cell, r.document, r.start, r.length)] for r in rows])
    assert [sum(r.length.tolist()) for r in rows].count(32) == 33
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "3962ce34425fa4ff1b23e7159d281916b07938530f8fbcf778695525c1477c34"
    )


def test_shares_move_through_the_stage() -> None:
    """Windows take what the stage gives on the way: a tenth of the tokens at first, nine tenths at the end."""
    lengths = {A: np.full(4000, 4), B: np.full(4000, 4)}
    quotas = LinearQuotas(400 * 32, {A: 0.1, B: 0.9}, {A: 0.9, B: 0.1})
    plan = RowPlanner(lengths, quotas, seed=1, seq_len=32, num_rows=400)
    share = [float(np.mean(np.concatenate([plan.row(20 * w + r).cell == 0 for r in range(20)]))) for w in range(20)]
    assert share == pytest.approx([0.1 + 0.8 * (20 * w + 10) / 400 for w in range(20)], abs=0.03)
    assert plan.drawn() == {A: 6400, B: 6400}


def test_what_whole_documents_leave_of_their_quota_goes_to_others() -> None:
    """30 of 32 tokens are given by a document that is not cut; the 2 others come from the other cell, and no row is short."""
    quotas = LinearQuotas(64, {A: 0.5, B: 0.5}, {A: 0.5, B: 0.5}, frozenset({B}))
    plan = RowPlanner({A: np.full(40, 1), B: np.array([30])}, quotas, seed=1, seq_len=32, num_rows=2)
    assert plan.drawn() == {A: 34, B: 30}
    assert plan.drawn(without=[0]) == {A: 34 - int((plan.row(0).cell == 0).sum()), B: 30 - 30 * (1 in plan.row(0).cell)}


def test_what_was_put_off_comes_first_in_the_next_window() -> None:
    """Pieces of 3 in rows of 4 leave a quarter free; a window's rows are full, and what is left is trained in the next."""
    plan = RowPlanner({A: np.full(64, 3)}, constant(192, {A: 1.0}), seed=1, seq_len=4, num_rows=48)
    seen = [plan.row(index).document.tolist() for index in range(48)]
    assert [len(documents) for documents in seen] == [1] * 48
    assert len({documents[0] for documents in seen}) == 48, "each document once before any is repeated"
