"""Mixing: quotas sum to the tokens of the stage, meet both marginals where that can be, and every miss is said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1_data.sampling.mix import TooLittleData, plan_mix
from m1_data.sampling.mix_report import TOLERANCE, report_mix
from m1_data.spec import StageMix
from m1_data.storage.cell import Cell

DOMAINS = ("code", "stem", "book", "general")
BUCKETS = ("lt32k", "32k-128k", "128k-256k", "ge1m")
ALL = [Cell(f"src-{d}", d, b) for d, b in itertools.product(DOMAINS, BUCKETS)]


def stage(short: float = 0.3, medium: float = 0.3, long: float = 0.4, **more: object) -> StageMix:
    return StageMix(stage="s", seq_len_tokens=64, short=short, medium=medium, long=long, long_qa_share=0.0, **more)


@settings(deadline=None, max_examples=80)
@given(tokens=st.lists(st.integers(1, 10**9), min_size=len(ALL), max_size=len(ALL)))
def test_full_grid_meets_both_marginals(tokens: list[int]) -> None:
    """With every cell filled any pair of marginals is feasible (within 10^9 to 1 of the sizes)."""
    cells = dict(zip(ALL, tokens, strict=True))
    plan = plan_mix(cells, stage(max_epochs=1e9), stage_tokens=10**7)
    report = report_mix(plan, cells, plan.quotas, rows_tokens=10**7)
    assert sum(plan.last.values()) == pytest.approx(1, abs=1e-9)
    assert {k: v.reached for k, v in report.length_classes.items()} == pytest.approx(
        {"short": 0.3, "medium": 0.3, "long": 0.4}, abs=1e-5
    )
    assert report.core.reached == pytest.approx(0.7, abs=TOLERANCE)
    assert report.reasons == ()


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.sampled_from([0, 0, 1, 50, 10_000]), min_size=len(ALL), max_size=len(ALL)),
    want=st.sampled_from([(1, 0, 0), (0.3, 0.7, 0), (0.3, 0.3, 0.4)]),
    stage_tokens=st.sampled_from([100, 20_000]),
    domains=st.sampled_from([{}, {"code": 3.0, "general": 1.0}, {"book": 1.0}]),
    max_epochs=st.sampled_from([1.0, 4.0, 2.3]),
    moving=st.booleans(),
)
def test_quotas_sum_to_the_stage_within_epochs_and_misses_are_said(
    tokens: list[int],
    want: tuple[float, float, float],
    stage_tokens: int,
    domains: dict[str, float],
    max_epochs: float,
    moving: bool,
) -> None:
    cells = dict(zip(ALL, tokens, strict=True))
    mix = stage(*want, domains=domains, max_epochs=max_epochs)
    previous = stage(0.5, 0.5, 0, core_share=0.1) if moving else None
    present = {c.length_class for c, n in cells.items() if n}
    usable = sum(int(n * max_epochs + 1e-6) for c, n in cells.items() if getattr(mix, c.length_class) > 0)
    missing = {name for name in ("short", "medium", "long") if getattr(mix, name) > 0} - present
    if missing or usable < stage_tokens:
        with pytest.raises(TooLittleData) as caught:
            plan_mix(cells, mix, stage_tokens=stage_tokens, previous=previous)
        assert {*caught.value.missing_classes} == missing
        return
    plan = plan_mix(cells, mix, stage_tokens=stage_tokens, previous=previous)
    assert sum(plan.quotas.values()) == stage_tokens
    assert all(0 <= n <= cells[c] * max_epochs + 1e-6 for c, n in plan.quotas.items())
    assert all(cells[c] > 0 and getattr(mix, c.length_class) > 0 for c in plan.quotas)
    report = report_mix(plan, cells, plan.quotas, rows_tokens=stage_tokens)
    text = " ".join(report.reasons)
    for name, share in report.length_classes.items():
        assert share.reached == pytest.approx(sum(v for c, v in report.shares.items() if c.length_class == name))
        assert (abs(share.wanted - share.reached) > TOLERANCE) == (f"{name} documents: " in text)
    assert (abs(report.core.wanted - report.core.reached) > TOLERANCE) == ("together" in text)


def test_a_missing_corner_is_named() -> None:
    cells = {c: 1000 for c in ALL if (c.domain, c.bucket) not in {("book", "128k-256k"), ("book", "ge1m")}}
    mix = stage(0, 0, 1, domains={"book": 1.0, "code": 1.0, "general": 1.0})
    plan = plan_mix(cells, mix, stage_tokens=1000)
    report = report_mix(plan, cells, plan.quotas, rows_tokens=1000)
    assert "no documents of domain book in the length classes this stage uses" in report.reasons
    assert report.core.reached == pytest.approx(0.7)


@settings(deadline=None, max_examples=40)
@given(progress=st.floats(0.01, 1), weights=st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_on_the_way_lengths_are_kept_and_sources_move_linearly(progress: float, weights: list[float]) -> None:
    """The mean share of a source up to ``progress`` is half-way between its first share and the share there."""
    cells = dict.fromkeys(ALL, 1000)
    mix, old = stage(domains=dict(zip(DOMAINS, weights, strict=True)), max_epochs=1e6), stage(1, 0, 0)
    plan = plan_mix(cells, mix, stage_tokens=10**6, previous=old)
    before = plan_mix(cells, old, stage_tokens=1000)
    now = plan.tokens_by(progress)
    total = progress * 10**6
    assert sum(now.values()) == pytest.approx(total)
    for domain in DOMAINS:
        a, b = (sum(v for c, v in shares.items() if c.domain == domain) for shares in (before.last, plan.last))
        share = sum(v for c, v in now.items() if c.domain == domain) / total
        assert share == pytest.approx(a + progress / 2 * (b - a), abs=1e-6)
    assert sum(v for c, v in now.items() if c.length_class == "long") / total == pytest.approx(0.4)
