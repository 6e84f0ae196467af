"""A data filter sees cleaned texts in order, and its rejections are counted and never written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m1_data.prepare import filters
from m1_data.prepare.filters import apply_filters, filter_texts
from m1_data.prepare.run import prepare
from m1_data.prepare.tally import Tally
from m1_data.spec import PrepareSpec, SourceSpec, TokenizerSpec
from m1_data.storage.store import open_store


def without_drafts(text: str, tally: Tally) -> str | None:
    if text.startswith("draft"):
        tally.rejected["draft"] += 1
        return None
    return text


def upper(text: str, tally: Tally) -> str | None:
    tally.noted["upper case"] += 1
    return text.upper()


def test_without_filters_every_text_stays() -> None:
    tally = Tally()
    assert list(filter_texts(["a", "draft b"], tally)) == ["a", "draft b"]
    assert tally == Tally()


def test_filters_run_in_order_and_stop_at_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "FILTERS", (without_drafts, upper))
    tally = Tally()
    assert list(filter_texts(["a", "draft b", "c"], tally)) == ["A", "C"]
    assert tally.rejected == {"draft": 1}
    assert tally.noted == {"upper case": 2}
    monkeypatch.setattr(filters, "FILTERS", (upper, without_drafts))
    assert apply_filters("draft b", Tally()) == "DRAFT B"


def test_rejections_are_in_the_manifest_and_not_in_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "FILTERS", (without_drafts,))
    texts = [f"document {n} is about the number {n}" for n in range(40)] + ["draft of a document"] * 3
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{text}\r\n"}) + "\n" for text in texts)
    spec = PrepareSpec(sources=(SourceSpec(name="a", domain="code", format="jsonl", path="a.jsonl"),))
    manifest, _ = prepare(spec, TokenizerSpec(vocab_size=300), [], base_dir=tmp_path, length_scale=1.0)
    assert manifest.sources[0].records == 43
    assert manifest.sources[0].documents + manifest.sources[0].held_out == 40
    assert manifest.sources[0].rejected == {"draft": 3}
    stored = sum(
        len(r.lengths) for held in (False, True) for r in open_store(tmp_path / "data", held_out=held).readers.values()
    )
    assert stored == 40
