"""Mixing: shares sum to 1, meet both marginals where that is possible, and every miss is said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from m1_data.sampling.mix import TOLERANCE, interpolate, plan_mix
from m1_data.spec import StageMix
from m1_data.storage.cell import Cell
from m1_stages.errors import DataError

DOMAINS = ("code", "stem", "book", "general")
BUCKETS = ("lt32k", "32k-128k", "128k-256k", "ge1m")
ALL = [Cell(f"src-{d}", d, b) for d, b in itertools.product(DOMAINS, BUCKETS)]


def stage(short: float = 0.3, medium: float = 0.3, long: float = 0.4, **more: object) -> StageMix:
    return StageMix(stage="s", seq_len_tokens=64, short=short, medium=medium, long=long, long_qa_share=0.0, **more)


@settings(deadline=None, max_examples=80)
@given(tokens=st.lists(st.integers(1, 10**9), min_size=len(ALL), max_size=len(ALL)))
def test_full_grid_meets_both_marginals(tokens: list[int]) -> None:
    """With every cell filled any pair of marginals is feasible (within 10^9 to 1 of the sizes)."""
    plan = plan_mix(dict(zip(ALL, tokens, strict=True)), stage(), stage_tokens=None)
    assert sum(plan.shares.values()) == pytest.approx(1, abs=1e-9)
    assert {k: v.reached for k, v in plan.length_classes.items()} == pytest.approx(
        {"short": 0.3, "medium": 0.3, "long": 0.4}, abs=1e-6
    )
    assert plan.core.reached == pytest.approx(0.7, abs=TOLERANCE)
    assert plan.reasons == ()


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.sampled_from([0, 0, 1, 50, 10_000]), min_size=len(ALL), max_size=len(ALL)),
    want=st.sampled_from([(1, 0, 0), (0.3, 0.7, 0), (0.3, 0.3, 0.4)]),
    stage_tokens=st.sampled_from([None, 100, 20_000]),
    domains=st.sampled_from([{}, {"code": 3.0, "general": 1.0}, {"book": 1.0}]),
)
def test_shares_sum_to_one_within_epochs_and_misses_are_said(
    tokens: list[int], want: tuple[float, float, float], stage_tokens: int | None, domains: dict[str, float]
) -> None:
    cells = dict(zip(ALL, tokens, strict=True))
    mix = stage(*want, domains=domains)
    try:
        plan = plan_mix(cells, mix, stage_tokens=stage_tokens)
    except DataError:
        usable = sum(n for c, n in cells.items() if getattr(mix, c.length_class) > 0)
        assert usable == 0 or (stage_tokens is not None and usable * mix.max_epochs < stage_tokens)
        return
    assert sum(plan.shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(share >= 0 and cells[c] > 0 and getattr(mix, c.length_class) > 0 for c, share in plan.shares.items())
    assert all(n <= mix.max_epochs * (1 + 1e-6) for n in plan.epochs.values())
    text = " ".join(plan.reasons)
    for name, share in plan.length_classes.items():
        assert share.reached == pytest.approx(sum(v for c, v in plan.shares.items() if c.length_class == name))
        assert (abs(share.wanted - share.reached) > TOLERANCE) == (f"{name} documents: " in text)
    assert (abs(plan.core.wanted - plan.core.reached) > TOLERANCE) == ("together" in text)


def test_a_missing_corner_is_named() -> None:
    cells = {c: 1000 for c in ALL if (c.domain, c.bucket) not in {("book", "128k-256k"), ("book", "ge1m")}}
    plan = plan_mix(cells, stage(0, 0, 1, domains={"book": 1.0, "code": 1.0, "general": 1.0}), stage_tokens=None)
    assert "no documents of domain book in the length classes this stage uses" in plan.reasons
    assert plan.core.reached == pytest.approx(0.7)


def test_max_epochs_moves_the_rest_to_others_and_says_so() -> None:
    code, web = Cell("lib", "code", "lt32k"), Cell("web", "general", "lt32k")
    plan = plan_mix({code: 100, web: 10_000}, stage(1, 0, 0), stage_tokens=1000)
    assert plan.shares == pytest.approx({code: 0.4, web: 0.6})
    assert plan.epochs == pytest.approx({code: 4.0, web: 0.06})
    assert len([r for r in plan.reasons if "4 passes are reached by lib/lt32k" in r]) >= 1


def test_long_question_answers_come_in_the_last_fifth() -> None:
    code, qa = Cell("lib", "code", "lt32k"), Cell("qa", "long_qa", "ge1m")
    mix = StageMix(stage="s", seq_len_tokens=64, short=1, medium=0, long=0)
    plan = plan_mix({code: 1000, qa: 1000}, mix, stage_tokens=1000)
    assert interpolate(None, plan, 0.79) == {code: 1.0}
    assert interpolate(None, plan, 0.8) == pytest.approx({code: 0.9, qa: 0.1})
    assert not any("question" in r for r in plan.reasons)
    absent = plan_mix({code: 1000}, mix, stage_tokens=1000)
    assert any(
        "long question-answer data: 0.0% of the last fifth instead of 10.0%; there is none" in r for r in absent.reasons
    )


@settings(deadline=None, max_examples=40)
@given(progress=st.floats(0, 1), weights=st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_interpolation_keeps_lengths_and_moves_sources_linearly(progress: float, weights: list[float]) -> None:
    cells = dict.fromkeys(ALL, 1000)
    old = plan_mix(cells, stage(1, 0, 0), stage_tokens=None)
    new = plan_mix(cells, stage(domains=dict(zip(DOMAINS, weights, strict=True))), stage_tokens=None)
    assume(new.reasons == ())
    now = interpolate(old, new, progress)
    assert sum(now.values()) == pytest.approx(1)
    for domain in DOMAINS:
        a, b = old.domains[domain].reached, new.domains[domain].reached
        share = sum(v for c, v in now.items() if c.domain == domain)
        assert share == pytest.approx(a + progress * (b - a), abs=1e-6)
    assert sum(v for c, v in now.items() if c.length_class == "long") == pytest.approx(0.4)
