"""Documents held out by ``prepare``: chosen by their hash, few, the same in every run, and in no row of training."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from m1_data.prepare.run import prepare
from m1_data.prepare.shards import HELD_OUT_KEEPS, may_be_held_out
from m1_data.sampling.loader import PackedDataset
from m1_data.sampling.needles import KEY_TOKENS, PAIR_TOKENS
from m1_data.spec import PrepareSpec, SourceSpec, StageMix, TokenizerSpec
from m1_data.storage.cell import Cell
from m1_data.storage.indexed import IndexedReader
from m1_data.storage.manifest import Manifest
from m1_data.storage.store import open_store
from m1_stages.errors import DataError

MIX = StageMix(stage="128k", seq_len_tokens=512, short=0.5, medium=0.5, long=0.0, core_share=1.0, max_epochs=50.0)


def write_texts(folder: Path, documents: int = 2_000) -> list[str]:
    rng = random.Random(7)
    words = [f"{a}{b}" for a in "bdgklmnprst" for b in ("an", "er", "ist", "ong", "ulo")]
    texts = [f"{n}: " + " ".join(rng.choices(words, k=rng.choice((12, 20, 150)))) for n in range(documents)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def run(folder: Path, **more: Any) -> Manifest:
    source = SourceSpec(name="texts", domain="stem", format="jsonl", path="texts.jsonl")
    spec = PrepareSpec(**{"sources": (source,), "verify_docs": 1} | more)
    mixes = [(MIX, 10_000)]
    return prepare(spec, TokenizerSpec(vocab_size=400), mixes, base_dir=folder, length_scale=1 / 256)[0]


def decoded(folder: Path, *, held_out: bool) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "data" / "tokenizer" / "tokenizer.json"))
    return [
        tokenizer.decode(reader.get(n, 0, int(reader.lengths[n]) - 1).tolist(), skip_special_tokens=False)
        for reader in open_store(folder / "data", held_out=held_out).readers.values()
        for n in range(len(reader.lengths))
    ]


def test_held_out_by_hash_few_and_again_the_same(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    manifest = run(tmp_path)
    out, kept = decoded(tmp_path, held_out=True), decoded(tmp_path, held_out=False)
    assert sorted(out + kept) == sorted(texts), "no document is lost or in both"
    assert all(may_be_held_out(text) for text in out)
    assert {s.bucket for s in manifest.held_out} == {"lt32k", "32k-128k"}
    sizes = {(s.source, s.bucket): s.documents for s in manifest.shards}
    for shard in manifest.held_out:
        assert 10 < shard.documents <= 16
        assert sizes[shard.source, shard.bucket] >= HELD_OUT_KEEPS * shard.documents
    (source,) = manifest.sources
    assert (source.held_out, source.documents) == (len(out), len(kept))
    (tmp_path / "data").rename(tmp_path / "first")
    assert run(tmp_path).held_out == manifest.held_out


def test_held_out_documents_are_in_no_row(tmp_path: Path) -> None:
    """Every row of several epochs, decoded: all other documents appear, these do not."""
    from tokenizers import Tokenizer

    write_texts(tmp_path)
    run(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer" / "tokenizer.json"))
    rows = PackedDataset(tmp_path / "data", MIX, None, seed=1, seq_len=512, num_rows=1_600)
    seen = {tokenizer.decode(piece.tokens.tolist()).split(":")[0] for n in range(len(rows)) for piece in rows.row(n)}
    out = {text.split(":")[0] for text in decoded(tmp_path, held_out=True)}
    kept = {text.split(":")[0] for text in decoded(tmp_path, held_out=False)}
    assert len(out) > 20
    assert not seen & out
    assert len(seen & kept) > 0.95 * len(kept), "else it says little that the others are absent"


@pytest.mark.parametrize("settings", [{"held_out": 0}, {"dedup": "none"}], ids=["switched off", "copies are kept"])
def test_nothing_is_held_out(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_texts(tmp_path)
    manifest = run(tmp_path, **settings)
    assert (manifest.held_out, manifest.sources[0].documents) == ((), 2_000)


def test_small_buckets_are_left_alone(tmp_path: Path) -> None:
    write_texts(tmp_path, documents=40)
    assert run(tmp_path).held_out == ()
    assert open_store(tmp_path / "data", held_out=True).readers == {}


def needles(**more: Any) -> SourceSpec:
    return SourceSpec(**{"name": "needles", "domain": "long_qa", "format": "needles", "max_docs": 30} | more)


def test_a_source_of_needles_is_hidden_in_the_text_and_drawn_where_it_fits(tmp_path: Path) -> None:
    write_texts(tmp_path)
    text = SourceSpec(name="texts", domain="stem", format="jsonl", path="texts.jsonl")
    spec = PrepareSpec(sources=(needles(), text), verify_docs=1)
    short = dataclasses.replace(MIX, stage="32k", seq_len_tokens=128, short=1.0, medium=0.0)
    mixes = [(short, 10_000), (MIX, 10_000)]
    manifest, _ = prepare(spec, TokenizerSpec(vocab_size=400), mixes, base_dir=tmp_path, length_scale=1 / 256)
    made = {s.bucket: s for s in manifest.shards if s.source == "needles"}
    assert sum(s.documents for s in made.values()) == 30
    assert manifest.sources[-1].name == "needles"
    text_ids = set()
    for shard in manifest.shards:
        reader = IndexedReader(tmp_path / "data" / shard.prefix)
        for n in range(len(reader) if shard.source == "texts" else 0):
            text_ids.update(reader.get(n)[:-1].tolist())
    reader = IndexedReader(tmp_path / "data" / made["32k-128k"].prefix)
    for n in range(len(reader)):
        ids = reader.get(n)
        assert 128 <= len(ids) <= 512
        assert set(ids[:-1].tolist()) <= text_ids
        key = ids[-1 - PAIR_TOKENS : -1 - PAIR_TOKENS + KEY_TOKENS].tobytes()
        assert ids.tobytes().count(key) == 2
    plans = {
        mix.stage: PackedDataset(tmp_path / "data", mix, None, seed=1, seq_len=mix.seq_len_tokens, num_rows=40).mix_plan
        for mix in (short, MIX)
    }
    cells = [Cell("needles", "long_qa", bucket) for bucket in ("lt32k", "32k-128k")]
    assert set(plans["128k"].long_qa) == set(cells)
    assert set(plans["32k"].long_qa) == {cells[0]}, "a document longer than a row would be cut off its question"
    assert any("32k-128k does not fit" in reason for reason in plans["32k"].reasons)
    for stage, plan in plans.items():
        assert manifest.mixes[stage]["long_qa"], stage
        assert {x["bucket"] for x in manifest.mixes[stage]["long_qa"]} == {c.bucket for c in plan.long_qa}


@pytest.mark.parametrize(
    ("sources", "says"),
    [((needles(max_docs=0),), "generates needles without end"), ((needles(),), "there is no text to hide needles in")],
    ids=["how many", "no text"],
)
def test_needles_need_a_number_and_a_text(tmp_path: Path, sources: tuple[SourceSpec, ...], says: str) -> None:
    with pytest.raises(DataError, match=says):
        run(tmp_path, sources=sources)
