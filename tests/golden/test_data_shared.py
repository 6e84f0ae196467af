"""Real corpora and deliberately broken files, with what is right for each written down beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.shared_data import shared_data, unpack_zst

from m1_data.prepare.clean import clean
from m1_data.prepare.deduplicate import ExactDedup
from m1_data.prepare.encode import Encoder
from m1_data.prepare.reader import read_source
from m1_data.prepare.run import prepare
from m1_data.prepare.tally import Tally
from m1_data.spec import BUCKET_NAMES, PrepareSpec, SourceSpec, TokenizerSpec
from m1_data.storage.manifest import Manifest
from m1_data.storage.store import open_prepared
from m1_data.tokenizer import LoadedTokenizer, load_tokenizer
from m1_stages.errors import DataError


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return unpack_zst(shared_data() / "tokenizers" / "minimax_m1_200k.json.zst", target)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    target = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    return load_tokenizer(unpack_zst(shared_data() / "tokenizers" / "gpt2_50k.json.zst", target), "")


def test_the_corpus_has_the_tokens_it_is_known_to_have(minimax: Path, tmp_path: Path) -> None:
    known = json.loads((shared_data() / "MANIFEST.json").read_text())
    sources = tuple(
        SourceSpec(
            name=Path(k["file"]).name.split(".")[0],
            domain=k["domain"],
            format="jsonl",
            path=str(shared_data() / k["file"]),
        )
        for k in known
    )
    spec = PrepareSpec(out="data", sources=sources, dedup="none")
    manifest, did = prepare(spec, TokenizerSpec(path=str(minimax)), [], base_dir=tmp_path, length_scale=1.0)
    assert did
    assert (manifest.vocab_size, manifest.eod_id, manifest.eod_token) == (200_064, 200_021, "<end_of_document>")
    for source, expected in zip(manifest.sources, known, strict=True):
        assert source.documents == expected["docs"], source.name
        assert source.tokens == expected["tokens_minimax"], source.name
        assert source.longest_tokens == expected["longest_doc_tokens"], source.name
        assert _buckets(manifest, source.name) == [
            (expected["docs_per_bucket"][k], expected["tokens_per_bucket"][k]) for k in expected["docs_per_bucket"]
        ], source.name
    _megatron_reads_what_tokenizers_gives(tmp_path / "data", sources[0], minimax)
    assert open_prepared(tmp_path / "data").manifest == manifest


def _buckets(manifest: Manifest, source: str) -> list[tuple[int, int]]:
    """(documents, tokens without end-of-document) per bucket, as the known manifest counts them."""
    shards = {s.bucket: s for s in manifest.shards if s.source == source}
    return [
        (shards[b].documents, shards[b].tokens - shards[b].documents) if b in shards else (0, 0) for b in BUCKET_NAMES
    ]


def _megatron_reads_what_tokenizers_gives(data: Path, source: SourceSpec, tokenizer: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(tokenizer))
    reference.encode_special_tokens = True
    dataset = IndexedDataset(str(data / "shards" / source.name / "lt32k"))
    texts = list(read_source(source, Path(), Tally()))
    assert len(dataset) == len(texts)
    for index in (*range(50), len(texts) - 1):
        expected = [*reference.encode(texts[index], add_special_tokens=False).ids, 200_021]
        np.testing.assert_array_equal(dataset[index], expected)


def read(name: str, **options: Any) -> tuple[list[str], Tally]:
    """Clean texts of one dirty file."""
    tally = Tally()
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    source = SourceSpec(
        name="dirty", domain="general", format=kind, path=str(shared_data() / "dirty" / name), **options
    )
    texts = [t for raw in read_source(source, Path(), tally) if (t := clean(raw, tally)) is not None]
    return texts, tally


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("multi_frame.jsonl.zst", 40),
        ("skippable_frame.jsonl.zst", 20),
        ("gzip_named_zst.jsonl.zst", 40),
        ("plain_named_zst.jsonl.zst", 4),
        ("no_final_newline.jsonl.zst", 3),
        ("crlf_lines.jsonl.zst", 3),
        ("giant_line_real_text.jsonl.zst", 1),
        ("pathological.jsonl.zst", 12),  # of 14, two are nothing but white space
        ("special_tokens_in_text.jsonl.zst", 11),
        ("near_duplicates.jsonl.zst", 200),
        ("eval_contamination.jsonl.zst", 225),
        ("empty_file.jsonl.zst", 0),
        ("dictionary_text.parquet", 10),
        ("binary_text.parquet", 10),
        ("nulls_large_string.parquet", 28),
    ],
)
def test_readable_files_give_every_document(name: str, documents: int) -> None:
    texts, tally = read(name)
    assert len(texts) == documents
    assert tally.records == len(texts) + sum(tally.rejected.values())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("truncated.jsonl.zst", "17 complete lines came before"),
        ("truncated_at_line.jsonl.zst", "incomplete; 20 complete lines came before"),
        ("bitflip.jsonl.zst", "damaged or cut"),
        ("zero_bytes.jsonl.zst", "the file is empty"),
        ("truncated.parquet", "not a readable Parquet file"),
        ("wrong_column.parquet", "there is no column 'text'; the file has"),
    ],
)
def test_broken_files_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(name)
    assert says in caught.value.what
    assert name in caught.value.where
    assert caught.value.fix


def test_wrong_column_reads_when_named() -> None:
    assert len(read("wrong_column.parquet", text_field="content")[0]) == 10


def test_bad_utf8_is_counted_by_class() -> None:
    texts, tally = read("bad_utf8.jsonl.zst")
    assert len(texts) == 9, "5 clean, 2 with a byte-order mark, 2 with NUL"
    assert tally.rejected == {"invalid UTF-8": 8, "lone surrogate": 3}
    assert tally.noted["byte-order mark"] == 2
    assert tally.noted["NUL character kept"] == 2
    assert all(text.encode().decode() == text for text in texts)


def test_only_strictly_valid_lines_give_documents() -> None:
    expected = json.loads((shared_data() / "dirty" / "EXPECTED.json").read_text())["empty_null_malformed.jsonl.zst"]
    texts, tally = read("empty_null_malformed.jsonl.zst")
    assert len(texts) == len(expected["usable_strict"])
    assert tally.records == expected["lines"]
    assert tally.records == len(texts) + sum(tally.rejected.values())


def test_long_window_and_duplicates() -> None:
    tally, dedup = Tally(), ExactDedup()
    source = SourceSpec(
        name="d", domain="general", format="jsonl", path=str(shared_data() / "dirty" / "long_window_29.jsonl.zst")
    )
    unique = sum(dedup.is_new(t) for raw in read_source(source, Path(), tally) if (t := clean(raw, tally)))
    assert (tally.records, unique) == (22_560, 282)


def test_exact_duplicates_keep_the_first() -> None:
    texts, _ = read("exact_duplicates.jsonl.zst")
    dedup = ExactDedup()
    kept = [text for text in texts if dedup.is_new(text)]
    assert (len(texts), len(kept)) == (190, 120)
    assert kept[0] == texts[0]


@pytest.mark.parametrize("engine", ["gigatoken", "fastokens"])
def test_engines_agree_with_tokenizers_on_hostile_text(engine: str, gpt2: LoadedTokenizer) -> None:
    texts = [
        t[:60_000] for name in ("pathological.jsonl.zst", "special_tokens_in_text.jsonl.zst") for t in read(name)[0]
    ]
    ids, offsets = Encoder(gpt2, engine).encode(texts)
    expected, bounds = Encoder(gpt2, "tokenizers").encode(texts)
    np.testing.assert_array_equal(offsets, bounds)
    np.testing.assert_array_equal(ids, expected)
    assert gpt2.eod_id not in ids, "control tokens written in a text stay text"
