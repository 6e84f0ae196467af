"""What is reported is what is drawn: all rows of a stage over cells of every shape, counted one by one."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1_data.sampling.mix import TooLittleData
from m1_data.sampling.stage_draw import StageDraw, count_mix, draws_of, refusals
from m1_data.spec import BUCKET_EDGES_TOKENS, BUCKET_NAMES, CORE_DOMAINS, StageMix
from m1_data.storage.cell import Cell

EDGES = [round(edge / 256) for edge in BUCKET_EDGES_TOKENS]
CURRICULUM = (
    (128, 1, 0, 0),
    (512, 0.3, 0.7, 0),
    (1024, 0.35, 0.45, 0.2),
    (2048, 0.35, 0.35, 0.3),
    (4096, 0.3, 0.3, 0.4),
)

DOCUMENTS = st.one_of(
    st.lists(st.integers(2_000, 20_000), min_size=1, max_size=3),  # a few long ones
    st.lists(st.integers(2, 60), min_size=1, max_size=4),  # next to nothing
    st.builds(lambda n, most: [10 + 7 * i % most for i in range(n)], st.integers(500, 2_000), st.integers(50, 300)),
    st.builds(lambda n: [80] * n, st.integers(50, 300)),  # more than half of the shortest rows: they leave it empty
    st.builds(lambda n: [2 + round(1.35**i) for i in range(n)], st.integers(10, 31)),  # all lengths
)
SOURCES = st.lists(st.tuples(st.sampled_from(("code", "stem", "general", "law")), DOCUMENTS), min_size=1, max_size=7)


def cells_of(sources: list[tuple[str, list[int]]]) -> dict[Cell, Any]:
    lengths: dict[Cell, list[int]] = {}
    for number, (domain, documents) in enumerate(sources):
        for n in documents:
            bucket = BUCKET_NAMES[bisect_right(EDGES, n - 1)]
            lengths.setdefault(Cell(f"source-{number}", domain, bucket), []).append(n)
    return {cell: np.array(counts, dtype=np.int64) for cell, counts in lengths.items()}


def mix_of(stage: tuple[int, float, float, float], **more: Any) -> StageMix:
    seq_len, short, medium, long = stage
    return StageMix(stage=f"of {seq_len}", seq_len_tokens=seq_len, short=short, medium=medium, long=long, **more)


def draw_all(draw: StageDraw, lengths: dict[Cell, Any]) -> tuple[Counter[Cell], Counter[tuple[Cell, int, int]]]:
    """Tokens of each cell, and how often the rows hold each first token of a piece's 16."""
    planner, cells = draw.planner(lengths, draw.plan(lengths)), list(lengths)
    tokens: Counter[Cell] = Counter()
    passes: Counter[tuple[Cell, int, int]] = Counter()
    for index in range(draw.num_rows):
        row = planner.row(index)
        assert 0 < row.length.sum() <= draw.seq_len
        for cell, document, start, length in zip(
            row.cell.tolist(), row.document.tolist(), row.start.tolist(), row.length.tolist(), strict=True
        ):
            tokens[cells[cell]] += length
            passes.update((cells[cell], document, at) for at in range(-(-start // 16) * 16, start + length, 16))
    return tokens, passes


@settings(deadline=None, max_examples=60)
@given(
    sources=SOURCES,
    questions=st.lists(st.integers(64, 120), max_size=20),
    stage=st.sampled_from(CURRICULUM),
    num_rows=st.sampled_from((1, 20, 60, 130)),
    max_epochs=st.sampled_from((1.0, 4.0, 2.5, 30.0)),
    moving=st.booleans(),
)
def test_the_report_is_the_count_and_no_cell_exceeds_its_passes(
    sources: list[tuple[str, list[int]]],
    questions: list[int],
    stage: tuple[int, float, float, float],
    num_rows: int,
    max_epochs: float,
    moving: bool,
) -> None:
    lengths = cells_of(sources)
    if questions:
        lengths[Cell("needles", "long_qa", "lt32k")] = np.array(questions, dtype=np.int64)
    previous = mix_of(CURRICULUM[0], core_share=0.2) if moving else None
    mix = mix_of(stage, max_epochs=max_epochs)
    draw = StageDraw(mix=mix, previous=previous, seq_len=stage[0], num_rows=num_rows, seed=3)
    try:
        report = count_mix(draw, lengths)
    except TooLittleData:
        assert list(refusals([draw], lengths)) == [mix.stage]
        return
    assert refusals([draw], lengths) == {}
    tokens, passes = draw_all(draw, lengths)
    assert {cell: n for cell, n in report.tokens.items() if n} == tokens
    total = sum(tokens.values())
    assert report.padding_share == pytest.approx(1 - total / draw.tokens)
    for name, share in report.length_classes.items():
        assert share.reached == pytest.approx(sum(n for c, n in tokens.items() if c.length_class == name) / total)
    core = sum(n for c, n in tokens.items() if c.domain in CORE_DOMAINS) / total
    assert report.core.reached == pytest.approx(core)
    for cell, epochs in report.epochs.items():
        assert epochs == pytest.approx(tokens[cell] / lengths[cell].sum())
        assert tokens[cell] <= lengths[cell].sum() * max_epochs
    assert max(passes.values()) <= np.ceil(max_epochs), "no token is met more often than that"


@settings(deadline=None, max_examples=10)
@given(sources=st.lists(st.tuples(st.sampled_from(("code", "law")), DOCUMENTS), min_size=5, max_size=7))
def test_what_is_wanted_is_reached_where_a_stage_is_long(sources: list[tuple[str, list[int]]]) -> None:
    """Nothing limits 400 rows out of these sources and 2,000 documents of each class: half a point, without looking ahead."""
    plenty = (
        ("code", [100] * 2_000 + [300] * 2_000 + [800] * 2_000),
        ("law", [99] * 2_000 + [299] * 2_000 + [799] * 2_000),
    )
    lengths = cells_of([*plenty, *sources])
    draw = StageDraw(mix=mix_of(CURRICULUM[4]), previous=None, seq_len=4096, num_rows=400, seed=3)
    report = count_mix(draw, lengths)
    assert {k: v.reached for k, v in report.length_classes.items()} == pytest.approx(
        {"short": 0.3, "medium": 0.3, "long": 0.4}, abs=0.005
    )
    assert report.core.reached == pytest.approx(0.7, abs=0.005)


def test_few_long_documents_take_their_share_and_no_more() -> None:
    """Six sources of one document, each longer than its share: they were drawn two and a half times as much as was reported."""
    long = [("book", [12_000])] * 6
    lengths = cells_of([("code", [31] * 9_000), ("general", [200] * 1_200), *long])
    mixes = [(mix_of(stage, long_qa_share=0.0), 245_760) for stage in CURRICULUM]
    for draw in draws_of(mixes, seed=1234)[2:]:
        report = count_mix(draw, lengths)
        for name, share in report.length_classes.items():
            assert share.reached == pytest.approx(getattr(draw.mix, name), abs=0.005)
        each = [epochs for cell, epochs in report.epochs.items() if cell.length_class == "long"]
        assert each == pytest.approx([draw.mix.long * 245_760 / 72_000] * 6, abs=0.1)


def test_draws_of_name_the_stage_before_and_are_told_apart() -> None:
    mixes = [(mix_of(stage), 8 * stage[0]) for stage in CURRICULUM[:2]]
    first, second = draws_of(mixes, seed=1)
    assert (first.previous, second.previous, second.num_rows) == (None, mixes[0][0], 8)
    orders = {d.order for d in (first, second, *draws_of(mixes, seed=2), *draws_of(mixes[1:], seed=1))}
    assert len(orders) == 5
