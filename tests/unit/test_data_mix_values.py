"""The mix by numbers that are worked out by hand, and the sentences that say what is missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from m1_data.sampling.mix import TooLittleData, plan_mix
from m1_data.sampling.mix_report import MixReport, report_mix
from m1_data.spec import StageMix
from m1_data.storage.cell import Cell

CODE, STEM = Cell("lib", "code", "lt32k"), Cell("math", "stem", "lt32k")
WEB, NEWS = Cell("web", "general", "lt32k"), Cell("news", "general", "32k-128k")
QA = Cell("qa", "long_qa", "lt32k")


def stage(short: float = 1.0, medium: float = 0.0, long: float = 0.0, **more: Any) -> StageMix:
    return StageMix(
        stage="s", seq_len_tokens=64, short=short, medium=medium, long=long, **{"long_qa_share": 0.0, **more}
    )


def as_planned(cells: Mapping[Cell, int], mix: StageMix, stage_tokens: int = 1000, **more: Any) -> MixReport:
    """The report of a stage whose rows hold exactly what was planned."""
    plan = plan_mix(cells, mix, stage_tokens=stage_tokens, **more)
    assert sum(plan.quotas.values()) == stage_tokens
    return report_mix(plan, cells, plan.quotas, rows_tokens=stage_tokens)


def test_core_and_other_domains_share_by_core_share_and_inside_by_tokens() -> None:
    """0.7 of the tokens to code and stem, 3 to 1 as they are at hand."""
    report = as_planned({CODE: 3000, STEM: 1000, WEB: 250}, stage())
    assert report.tokens == {CODE: 525, STEM: 175, WEB: 300}
    assert report.reasons == ()
    assert (report.core.wanted, report.core.reached) == (0.7, 0.7)
    assert report.domains["code"].wanted == pytest.approx(0.525)


def test_domain_weights_count_inside_their_group() -> None:
    mix = stage(domains={"code": 1.0, "stem": 4.0, "general": 9.0})
    assert as_planned({CODE: 3000, STEM: 1000, WEB: 250}, mix).tokens == {CODE: 140, STEM: 560, WEB: 300}


def test_length_classes_are_relative_weights() -> None:
    report = as_planned({WEB: 1000, NEWS: 1000}, stage(1.0, 3.0, core_share=0.0))
    assert report.tokens == {WEB: 250, NEWS: 750}
    assert {k: v.wanted for k, v in report.length_classes.items()} == {"short": 0.25, "medium": 0.75, "long": 0.0}


def test_epochs_are_passes_over_each_cell() -> None:
    report = as_planned({CODE: 1000, WEB: 300}, stage(), 2000)
    assert report.epochs == pytest.approx({CODE: 1.4, WEB: 2.0}, rel=1e-9)
    assert report.reasons == ()


def test_long_question_answers_take_their_share_of_the_last_fifth() -> None:
    """0.1 of a fifth of 1000 tokens is 20 tokens; they are short and outside the core domains, so they come off the web's."""
    cells, mix = {CODE: 1000, WEB: 300, QA: 100}, stage(long_qa_share=0.1)
    report = as_planned(cells, mix)
    assert report.tokens == {CODE: 700, WEB: 280, QA: 20}
    assert report.epochs == pytest.approx({CODE: 0.7, WEB: 280 / 300, QA: 0.2}, rel=1e-9)
    assert report.reasons == ()
    plan = plan_mix(cells, mix, stage_tokens=1000)
    assert plan.tokens_by(0.8)[QA] == 0
    assert plan.tokens_by(0.9) == pytest.approx({CODE: 700 * 0.89 / 0.98, WEB: 280 * 0.89 / 0.98, QA: 10}, rel=1e-9)
    assert plan.whole == {QA}


def test_classes_and_core_are_shares_of_all_tokens() -> None:
    """Ten of 20 question-answer tokens a hundred are medium: the news has that much less."""
    medium_qa = Cell("qa", "long_qa", "32k-128k")
    mix = stage(0.5, 0.5, core_share=0.5, long_qa_share=0.5)
    report = as_planned({CODE: 1000, NEWS: 1000, medium_qa: 1000}, mix)
    assert report.tokens == {CODE: 500, NEWS: 400, medium_qa: 100}
    assert report.reasons == ()


def test_long_question_answers_are_repeated_no_more_than_other_data() -> None:
    """Four passes over 2 tokens are 8 of the last 200: 4 %."""
    report = as_planned({CODE: 1000, WEB: 300, QA: 2}, stage(long_qa_share=0.1))
    assert report.tokens[QA] == 8
    assert report.reasons == (
        "long question-answer data: 4.0% of the last fifth instead of 10.0%; 4 passes hold no more",
    )


def test_long_question_answers_that_do_not_fit_into_a_row_are_excluded() -> None:
    cells = {CODE: 1000, WEB: 300, QA: 100}
    report = as_planned(cells, stage(long_qa_share=0.1), longest={QA: 65})
    assert QA not in report.tokens
    assert report.reasons == (
        "long question-answer data in lt32k does not fit into a row",
        "long question-answer data: 0.0% of the last fifth instead of 10.0%; there is none",
    )
    assert as_planned(cells, stage(long_qa_share=0.1), longest={QA: 64}).tokens[QA] == 20
    assert as_planned(cells, stage(), longest={QA: 65}).reasons == (), "none was wanted"


def test_a_cap_on_passes_moves_the_rest() -> None:
    """Four passes over 100 tokens are 0.4 of the stage; the class keeps its share, the domains do not."""
    report = as_planned({CODE: 100, WEB: 10_000}, stage())
    assert report.tokens == {CODE: 400, WEB: 600}
    limit = "; 4 passes are reached by lib/lt32k"
    assert report.reasons == (
        f"stem, code, book, reasoning together: 40.0% of the tokens instead of 70.0%{limit}",
        f"domain code: 40.0% of the tokens instead of 70.0%{limit}",
        f"domain general: 60.0% of the tokens instead of 30.0%{limit}",
    )


def test_passes_need_not_be_whole() -> None:
    """Two and a half passes over 101 tokens are 252 tokens, not 253."""
    report = as_planned({CODE: 101, WEB: 10_000}, stage(max_epochs=2.5))
    assert report.tokens == {CODE: 252, WEB: 748}


def test_a_class_with_one_token_is_not_said_to_be_empty() -> None:
    report = as_planned({WEB: 1000, NEWS: 1}, stage(0.5, 0.5, core_share=0.0), 100)
    limit = "; 4 passes are reached by news/32k-128k"
    assert report.reasons == (
        f"short documents: 96.0% of the tokens instead of 50.0%{limit}",
        f"medium documents: 4.0% of the tokens instead of 50.0%{limit}",
    )


def test_too_little_data_is_refused_with_the_numbers() -> None:
    with pytest.raises(TooLittleData) as caught:
        plan_mix({WEB: 249, QA: 10_000}, stage(), stage_tokens=1000)
    assert caught.value.what == ("stage s draws 1,000 tokens; the usable data has 249, 4 passes are 996")
    assert caught.value.where == "length classes short"
    assert (caught.value.tokens_of_passes, caught.value.missing_classes) == (996, ())
    assert as_planned({WEB: 250}, stage()).epochs == {WEB: 4.0}


@pytest.mark.parametrize(
    ("cells", "missing", "where"),
    [
        ({WEB: 1000, CODE: 0, QA: 5}, ("medium", "long"), "length classes at hand: short"),
        ({}, ("short", "medium", "long"), "length classes at hand: none"),
    ],
)
def test_a_missing_length_class_is_refused(cells: dict[Cell, int], missing: tuple[str, ...], where: str) -> None:
    with pytest.raises(TooLittleData) as caught:
        plan_mix(cells, stage(0.2, 0.5, 0.3), stage_tokens=1)
    shares = {"short": "20%", "medium": "50%", "long": "30%"}
    said = ", ".join(f"{shares[name]} of its tokens from {name} documents" for name in missing)
    assert caught.value.what == f"stage s draws {said} and there are none"
    assert (caught.value.where, caught.value.missing_classes) == (where, missing)


def test_nothing_but_questions_is_refused() -> None:
    with pytest.raises(TooLittleData, match="100% of its tokens from short documents and there are none"):
        plan_mix({QA: 1000}, stage(long_qa_share=0.1), stage_tokens=10)


def test_missing_domains_and_groups_are_named() -> None:
    mix = stage(domains={"code": 1.0, "book": 1.0, "general": 1.0})
    report = as_planned({CODE: 1000, WEB: 1000}, mix)
    assert report.reasons == ("no documents of domain book in the length classes this stage uses",)
    assert (report.domains["book"].wanted, report.domains["book"].reached) == (0.0, 0.0)
    assert as_planned({CODE: 1000}, stage()).reasons == (
        "stem, code, book, reasoning together: 100.0% of the tokens instead of 70.0%; there is no other data",
    )
    assert as_planned({WEB: 1000}, stage()).reasons == (
        "stem, code, book, reasoning together: 0.0% of the tokens instead of 70.0%; there is no such data",
    )


def test_a_length_class_that_only_one_domain_has_is_named() -> None:
    """All medium documents are general: where half of the tokens are medium, code can have no more than the other half."""
    report = as_planned({CODE: 1000, NEWS: 1000}, stage(0.5, 0.5))
    assert report.tokens == {CODE: 500, NEWS: 500}
    assert report.reasons == (
        "stem, code, book, reasoning together: 50.0% of the tokens instead of 70.0%; no short documents of domain general, "
        "no medium documents of domain code",
        "domain code: 50.0% of the tokens instead of 70.0%; no medium documents of domain code",
        "domain general: 50.0% of the tokens instead of 30.0%; no short documents of domain general",
    )


def test_sources_move_linearly_from_the_stage_before() -> None:
    cells = {CODE: 1000, WEB: 1000, STEM: 1000}
    mix, before = stage(core_share=0.6), stage(core_share=0.9, domains={"code": 1.0, "general": 1.0})
    plan = plan_mix(cells, mix, stage_tokens=1000, previous=before)
    assert plan.first == pytest.approx({CODE: 0.9, WEB: 0.1, STEM: 0.0}, abs=1e-9)
    assert plan.last == pytest.approx({CODE: 0.3, WEB: 0.4, STEM: 0.3}, abs=1e-9)
    assert plan.tokens_by(0.5) == pytest.approx({CODE: 375, WEB: 87.5, STEM: 37.5}, abs=1e-6)
    assert plan.quotas == {CODE: 600, WEB: 250, STEM: 150}
    report = report_mix(plan, cells, plan.quotas, rows_tokens=1000)
    assert report.reasons[0] == (
        "stem, code, book, reasoning together: 75.0% of the tokens instead of 60.0%; the sources move from those of the "
        "stage before"
    )


def test_max_epochs_holds_while_sources_move() -> None:
    """The stage before had nine tenths of code, of which there are four passes of 100 tokens."""
    plan = plan_mix({CODE: 100, WEB: 5000}, stage(core_share=0.2), stage_tokens=1000, previous=stage(core_share=0.9))
    assert plan.first == pytest.approx({CODE: 0.4, WEB: 0.6})
    assert plan.quotas == {CODE: 300, WEB: 700}


def test_a_share_that_only_the_rows_miss_is_said_to_be_so() -> None:
    plan = plan_mix({CODE: 1000, WEB: 1000}, stage(), stage_tokens=1000)
    report = report_mix(plan, {CODE: 1000, WEB: 1000}, {CODE: 600, WEB: 300}, rows_tokens=1000)
    assert report.padding_share == pytest.approx(0.1)
    assert report.reasons[0] == (
        "stem, code, book, reasoning together: 66.7% of the tokens instead of 70.0%; documents stay whole where they fit "
        "into a row, which leaves 10.0% of the rows empty"
    )


def test_as_dict_is_plain() -> None:
    found = as_planned({CODE: 700, WEB: 300, QA: 100}, stage(long_qa_share=0.1)).as_dict()
    code = {"source": "lib", "domain": "code", "bucket": "lt32k"}
    assert found["shares"][0] == {**code, "share": pytest.approx(0.7)}
    assert found["epochs"][0] == {**code, "epochs": pytest.approx(1.0), "tokens": 700}
    assert found["long_qa"] == [{"source": "qa", "domain": "long_qa", "bucket": "lt32k", "share": pytest.approx(0.1)}]
    assert found["core"] == {"wanted": 0.7, "reached": pytest.approx(0.7)}
    assert (found["stage"], found["reasons"], found["padding_share"]) == ("s", [], 0.0)
