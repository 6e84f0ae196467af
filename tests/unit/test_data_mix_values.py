"""The mix by numbers that are worked out by hand, and the sentences that say what is missed."""

from __future__ import annotations

from typing import Any

import pytest

from m1_data.errors import DataError
from m1_data.sampling.mix import interpolate, plan_mix
from m1_data.spec import StageMix
from m1_data.storage.cell import Cell

CODE, STEM = Cell("lib", "code", "lt32k"), Cell("math", "stem", "lt32k")
WEB, NEWS = Cell("web", "general", "lt32k"), Cell("news", "general", "32k-128k")
QA = Cell("qa", "long_qa", "ge1m")


def stage(short: float = 1.0, medium: float = 0.0, long: float = 0.0, **more: Any) -> StageMix:
    return StageMix(
        stage="s", seq_len_tokens=64, short=short, medium=medium, long=long, **{"long_qa_share": 0.0, **more}
    )


def test_core_and_other_domains_share_by_core_share_and_inside_by_tokens() -> None:
    """0.7 of the tokens to code and stem, 3 to 1 as they are at hand."""
    plan = plan_mix({CODE: 3000, STEM: 1000, WEB: 50}, stage(), stage_tokens=None)
    assert plan.shares == pytest.approx({CODE: 0.525, STEM: 0.175, WEB: 0.3}, rel=1e-9)
    assert (plan.epochs, plan.long_qa, plan.reasons) == ({}, {}, ())
    assert (plan.core.wanted, plan.core.reached) == (0.7, pytest.approx(0.7))
    assert plan.domains["code"].wanted == pytest.approx(0.525)


def test_domain_weights_count_inside_their_group() -> None:
    plan = plan_mix({CODE: 3000, STEM: 1000, WEB: 50}, stage(domains={"code": 1.0, "stem": 4.0, "general": 9.0}),
                    stage_tokens=None)  # fmt: skip
    assert plan.shares == pytest.approx({CODE: 0.14, STEM: 0.56, WEB: 0.3}, rel=1e-9)


def test_length_classes_are_relative_weights() -> None:
    plan = plan_mix({WEB: 1000, NEWS: 1000}, stage(1.0, 3.0, core_share=0.0), stage_tokens=None)
    assert plan.shares == pytest.approx({WEB: 0.25, NEWS: 0.75}, rel=1e-9)
    assert {k: v.wanted for k, v in plan.length_classes.items()} == {"short": 0.25, "medium": 0.75, "long": 0.0}


def test_epochs_are_passes_over_each_cell() -> None:
    plan = plan_mix({CODE: 1000, WEB: 300}, stage(), stage_tokens=2000)
    assert plan.shares == pytest.approx({CODE: 0.7, WEB: 0.3}, rel=1e-9)
    assert plan.epochs == pytest.approx({CODE: 1.4, WEB: 2.0}, rel=1e-9)
    assert plan.reasons == ()


def test_long_question_answers_take_their_share_of_the_last_fifth() -> None:
    """0.1 of a fifth of 1000 tokens is 20 tokens, a fifth of a pass over 100; the others lose a fiftieth."""
    plan = plan_mix({CODE: 1000, WEB: 300, QA: 100}, stage(long_qa_share=0.1), stage_tokens=1000)
    assert plan.long_qa == pytest.approx({QA: 0.1}, rel=1e-9)
    assert plan.epochs == pytest.approx({CODE: 0.7 * 0.98, WEB: 0.98, QA: 0.2}, rel=1e-9)
    assert interpolate(None, plan, 0.79) == plan.shares
    assert interpolate(None, plan, 0.8) == pytest.approx({CODE: 0.63, WEB: 0.27, QA: 0.1}, rel=1e-9)
    assert plan.reasons == ()


def test_long_question_answers_are_repeated_no_more_than_other_data() -> None:
    """Four passes over 2 tokens are 8 of the last 200: 4 %."""
    plan = plan_mix({CODE: 1000, WEB: 300, QA: 2}, stage(long_qa_share=0.1), stage_tokens=1000)
    assert plan.long_qa == pytest.approx({QA: 0.04}, rel=1e-9)
    assert plan.epochs[QA] == pytest.approx(4.0, rel=1e-9)
    assert plan.reasons == (
        "long question-answer data: 4.0% of the last fifth instead of 10.0%; 4 passes hold no more",
    )
    unknown = plan_mix({CODE: 1000, WEB: 300, QA: 2}, stage(long_qa_share=0.1), stage_tokens=None)
    assert unknown.long_qa == pytest.approx({QA: 0.1}, rel=1e-9)


def test_long_question_answers_that_do_not_fit_into_a_row_are_excluded() -> None:
    cells = {CODE: 1000, WEB: 300, QA: 100}
    plan = plan_mix(cells, stage(long_qa_share=0.1), stage_tokens=1000, longest={QA: 65})
    assert plan.long_qa == {}
    assert plan.reasons == (
        "long question-answer data in ge1m does not fit into a row",
        "long question-answer data: 0.0% of the last fifth instead of 10.0%; there is none",
    )
    assert plan_mix(cells, stage(long_qa_share=0.1), stage_tokens=1000, longest={QA: 64}).long_qa == {QA: 0.1}
    assert plan_mix(cells, stage(), stage_tokens=1000, longest={QA: 65}).reasons == (), "none was wanted"


def test_a_cap_on_passes_moves_the_rest() -> None:
    """Four passes over 100 tokens are 0.4 of the stage; the class keeps its share, the domains do not."""
    plan = plan_mix({CODE: 100, WEB: 10_000}, stage(), stage_tokens=1000)
    assert plan.shares == pytest.approx({CODE: 0.4, WEB: 0.6}, rel=1e-9)
    limit = "; 4 passes are reached by lib/lt32k"
    assert plan.reasons == (
        f"stem, code, book, reasoning together: 40.0% of the tokens instead of 70.0%{limit}",
        f"domain code: 40.0% of the tokens instead of 70.0%{limit}",
        f"domain general: 60.0% of the tokens instead of 30.0%{limit}",
    )


def test_a_class_with_one_token_is_not_said_to_be_empty() -> None:
    plan = plan_mix({WEB: 1000, NEWS: 1}, stage(0.5, 0.5, core_share=0.0), stage_tokens=100)
    limit = "; 4 passes are reached by news/32k-128k"
    assert plan.reasons == (
        f"short documents: 96.0% of the tokens instead of 50.0%{limit}",
        f"medium documents: 4.0% of the tokens instead of 50.0%{limit}",
    )


def test_too_little_data_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError) as caught:
        plan_mix({WEB: 249, QA: 10_000}, stage(), stage_tokens=1000)
    assert caught.value.what == ("stage s draws 1,000 tokens; the usable data has 249, 4 passes are 996")
    assert caught.value.where == "length classes short"
    assert plan_mix({WEB: 250}, stage(), stage_tokens=1000).epochs == {WEB: 4.0}


def test_no_data_of_any_wanted_length_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        plan_mix({WEB: 1000, CODE: 0, QA: 5}, stage(0, 0.5, 0.5), stage_tokens=None)
    assert caught.value.what == "stage s wants medium, long documents and there are none"
    assert caught.value.where == "2 non-empty cells in the prepared data"


def test_missing_classes_domains_and_groups_are_named() -> None:
    mix = stage(0.5, 0.25, 0.25, domains={"code": 1.0, "book": 1.0, "general": 1.0})
    plan = plan_mix({CODE: 1000, WEB: 1000}, mix, stage_tokens=None)
    assert plan.reasons == (
        "short documents: 100.0% of the tokens instead of 50.0%",
        "medium documents: 0.0% of the tokens instead of 25.0%; there are no medium documents",
        "long documents: 0.0% of the tokens instead of 25.0%; there are no long documents",
        "no documents of domain book in the length classes this stage uses",
    )
    assert (plan.domains["book"].wanted, plan.domains["book"].reached) == (0.0, 0.0)
    only_core = plan_mix({CODE: 1000}, stage(), stage_tokens=None)
    assert only_core.reasons == (
        "stem, code, book, reasoning together: 100.0% of the tokens instead of 70.0%; there is no other data",
    )
    no_core = plan_mix({WEB: 1000}, stage(), stage_tokens=None)
    assert no_core.reasons == (
        "stem, code, book, reasoning together: 0.0% of the tokens instead of 70.0%; there is no such data",
    )


def test_a_length_class_that_only_one_domain_has_is_named() -> None:
    """All medium documents are general: where half of the tokens are medium, code can have no more than the other half."""
    plan = plan_mix({CODE: 1000, NEWS: 1000}, stage(0.5, 0.5), stage_tokens=None)
    assert plan.shares == pytest.approx({CODE: 0.5, NEWS: 0.5}, abs=1e-6)
    assert plan.reasons == (
        "stem, code, book, reasoning together: 50.0% of the tokens instead of 70.0%; no short documents of domain general, "
        "no medium documents of domain code",
        "domain code: 50.0% of the tokens instead of 70.0%; no medium documents of domain code",
        "domain general: 50.0% of the tokens instead of 30.0%; no short documents of domain general",
    )


def test_another_row_length_is_said() -> None:
    reasons = plan_mix({CODE: 700, WEB: 300}, stage(), stage_tokens=None, seq_len_tokens=32).reasons
    assert reasons == ("rows have 32 tokens, the mix was written for 64",)
    assert plan_mix({CODE: 700, WEB: 300}, stage(), stage_tokens=None, seq_len_tokens=64).reasons == ()


def test_sources_move_linearly_from_the_stage_before() -> None:
    old = plan_mix({CODE: 1000, WEB: 1000}, stage(core_share=0.9), stage_tokens=None)
    new = plan_mix({CODE: 1000, WEB: 1000, STEM: 1000}, stage(core_share=0.6), stage_tokens=None)
    assert interpolate(old, new, 0.0) == pytest.approx({CODE: 0.9, WEB: 0.1, STEM: 0.0}, abs=1e-9)
    assert interpolate(old, new, 0.25) == pytest.approx({CODE: 0.75, WEB: 0.175, STEM: 0.075}, abs=1e-9)
    assert interpolate(old, new, 1.0) == pytest.approx({CODE: 0.3, WEB: 0.4, STEM: 0.3}, abs=1e-9)


def test_as_dict_is_plain() -> None:
    plan = plan_mix({CODE: 700, WEB: 300, QA: 100}, stage(long_qa_share=0.1), stage_tokens=1000)
    found = plan.as_dict()
    code = {"source": "lib", "domain": "code", "bucket": "lt32k"}
    assert found["shares"][0] == {**code, "share": pytest.approx(0.7)}
    assert found["epochs"][0] == {**code, "epochs": pytest.approx(0.98)}
    assert found["long_qa"] == [{"source": "qa", "domain": "long_qa", "bucket": "ge1m", "share": pytest.approx(0.1)}]
    assert found["core"] == {"wanted": 0.7, "reached": pytest.approx(0.7)}
    assert (found["stage"], found["reasons"]) == ("s", [])
