"""Packed rows: what a batch holds and which mistakes in the data are refused."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from m1_data.sampling.loader import PackedDataset, batch_rows
from m1_data.spec import StageMix
from m1_data.storage.cell import Cell
from m1_data.storage.indexed import IndexedWriter
from m1_data.storage.manifest import Manifest, ShardEntry
from m1_data.storage.store import Store
from m1_stages.errors import DataError

EOD, VOCAB = 0, 1000
SHORT, LONG = Cell("web", "general", "lt32k"), Cell("lib", "code", "32k-128k")
MIX = StageMix(stage="s", seq_len_tokens=64, short=1.0, medium=0.0, long=0.0, long_qa_share=0.0)


class Arrays:
    """Documents in memory."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = [np.array(d, dtype=np.int32) for d in documents]
        self.lengths = np.array([len(d) for d in documents], dtype=np.int32)

    def get(self, doc: int, start: int, length: int) -> np.ndarray:
        return self.documents[doc][start : start + length]


def documents(count: int, seed: int, low: int = 1, high: int = 150) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, VOCAB, rng.integers(low, high)).tolist(), EOD] for _ in range(count)]


def dataset(docs: list[list[int]], *, num_rows: int, mix: StageMix = MIX, seed: int = 1) -> PackedDataset:
    store = Store(readers={SHORT: Arrays(docs)}, vocab_size=VOCAB, eod_id=EOD, content_hash="x")
    return PackedDataset(store, mix, None, seed=seed, seq_len=64, num_rows=num_rows)


def test_one_document_longer_than_a_row_keeps_every_label() -> None:
    doc = [*range(1, 192), EOD]
    data = dataset([doc], num_rows=3)
    batch = data.batch([0, 1, 2])
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (1, 192)
    pairs = sorted(
        (t, n)
        for t, n, m in zip(batch.tokens[0].tolist(), batch.labels[0].tolist(), batch.loss_mask[0].tolist(), strict=True)
        if m
    )
    assert pairs == sorted(pairwise(doc))
    assert batch.trained_tokens == 191
    assert sorted(batch.doc_lengths) == [64, 64, 64]
    assert np.diff(batch.cu_seqlens.numpy()).tolist() == list(batch.doc_lengths)
    edges = batch.cu_seqlens.tolist()
    assert all(batch.position_ids[0, a:b].tolist() == list(range(b - a)) for a, b in pairwise(edges))
    assert batch.sample_ids == (0, 1, 2)


def test_the_end_of_a_document_predicts_nothing() -> None:
    batch = dataset(documents(50, 0), num_rows=40).batch(list(range(40)))
    at_eod = batch.tokens == EOD
    assert at_eod.sum() >= 25
    assert batch.loss_mask[at_eod].sum() == 0
    assert batch.loss_mask[~at_eod].min() == 1


def test_batch_rows_of_every_data_parallel_size_are_the_same_rows_in_the_same_order() -> None:
    for step in (0, 1, 7):
        whole = [i for rows in batch_rows(step, global_batch=8, dp_rank=0, dp_size=1, micro_batch=1) for i in rows]
        assert whole == list(range(8 * step, 8 * step + 8))
        for dp_size, micro in ((1, 2), (2, 2), (4, 1), (4, 2), (8, 1)):
            parts = [
                batch_rows(step, global_batch=8, dp_rank=r, dp_size=dp_size, micro_batch=micro) for r in range(dp_size)
            ]
            together = [[i for rows in micro_batches for i in rows] for micro_batches in zip(*parts, strict=True)]
            assert [i for rows in together for i in rows] == whole
            assert {len(rows) for part in parts for rows in part} == {micro}
    with pytest.raises(DataError, match="do not divide"):
        batch_rows(0, global_batch=8, dp_rank=0, dp_size=3, micro_batch=1)


def test_fingerprint_follows_all_that_determines_the_order() -> None:
    docs = documents(50, 0)
    base = dataset(docs, num_rows=10).fingerprint
    assert dataset(docs, num_rows=10).fingerprint == base
    assert dataset(docs, num_rows=10, seed=2).fingerprint != base
    assert dataset(docs, num_rows=11).fingerprint != base
    assert dataset(docs[:-1], num_rows=10).fingerprint != base
    other = StageMix(stage="s", seq_len_tokens=64, short=1.0, medium=0.0, long=0.0, max_epochs=5.0)
    assert dataset(docs, num_rows=10, mix=other).fingerprint != base


def test_rows_do_not_depend_on_the_order_they_are_asked_for() -> None:
    docs = documents(400, 3)
    forward = dataset(docs, num_rows=300)
    backward = dataset(docs, num_rows=300)
    late = [backward.batch([i]).tokens.tolist() for i in reversed(range(300))][::-1]
    assert [forward.batch([i]).tokens.tolist() for i in range(300)] == late


def test_refusals_name_the_place() -> None:
    docs = documents(50, 0)
    docs[7][0] = VOCAB
    bad = dataset(docs, num_rows=40)
    with pytest.raises(DataError, match=r"token id 1000 is outside the vocabulary of 1000.*document 7, token 0"):
        bad.batch(list(range(40)))
    long = StageMix(stage="1m", seq_len_tokens=64, short=0.3, medium=0.3, long=0.4)
    with pytest.raises(DataError, match="stage 1m draws 30% of its tokens from medium documents and there are none"):
        dataset(docs, num_rows=4, mix=long)
    with pytest.raises(DataError, match=r"draws .* passes are"):
        dataset(docs, num_rows=10_000)
    with pytest.raises(IndexError):
        bad.row(40)


def test_source_weights_move_from_the_previous_stage() -> None:
    a, b = Cell("a", "code", "lt32k"), Cell("b", "stem", "lt32k")
    store = Store(
        readers={
            a: Arrays(documents(4000, 1)),
            b: Arrays([[t + 1 for t in d[:-1]] + [EOD] for d in documents(4000, 2)]),
        },
        vocab_size=VOCAB + 1,
        eod_id=EOD,
        content_hash="x",
    )
    old = StageMix(stage="old", seq_len_tokens=64, short=1, medium=0, long=0, domains={"code": 0.9, "stem": 0.1})
    new = StageMix(stage="new", seq_len_tokens=64, short=1, medium=0, long=0, domains={"code": 0.1, "stem": 0.9})
    data = PackedDataset(store, new, old, seed=1, seq_len=64, num_rows=2000)

    def code_share(first: int, last: int) -> float:
        pieces = [data._planner.row(i) for i in range(first, last)]
        code = sum(int(p.length[p.cell == 0].sum()) for p in pieces)
        return code / sum(int(p.length.sum()) for p in pieces)

    assert code_share(0, 100) == pytest.approx(0.9, abs=0.03)
    assert code_share(900, 1100) == pytest.approx(0.5, abs=0.04)
    assert code_share(1900, 2000) == pytest.approx(0.1, abs=0.06)


def test_prepared_folder_gives_the_rows_of_its_documents_and_damage_is_refused(tmp_path: Path) -> None:
    docs = documents(50, 0)
    writer = IndexedWriter(tmp_path / "web" / "lt32k", VOCAB, EOD)
    for doc in docs:
        writer.add(np.array(doc[:-1]))
    shard = ShardEntry(source="web", domain="general", bucket="lt32k", prefix="web/lt32k", **writer.close())
    manifest = Manifest(
        fingerprint="f",
        engine="tokenizers",
        vocab_size=VOCAB,
        eod_id=EOD,
        eod_token="<eod>",
        tokenizer_sha256="",
        tokenizer_files={"tokenizer.json": hashlib.sha256(b"{}").hexdigest()},
        length_scale=1.0,
        bucket_edges_tokens=(32_768,),
        sources=(),
        shards=(shard,),
        tokens_by_domain={},
        tokens_by_bucket={},
        documents_by_bucket={},
        core_share=0.0,
        mixes={},
    )
    with pytest.raises(DataError, match="no prepared data"):
        PackedDataset(tmp_path, MIX, None, seed=1, seq_len=64, num_rows=20)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    data = PackedDataset(tmp_path, MIX, None, seed=1, seq_len=64, num_rows=20)
    in_memory = dataset(docs, num_rows=20)
    assert [data.batch([i]).tokens.tolist() for i in range(20)] == [
        in_memory.batch([i]).tokens.tolist() for i in range(20)
    ]
    tokens = tmp_path / "web" / "lt32k.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match="token file has") as caught:
        PackedDataset(tmp_path, MIX, None, seed=1, seq_len=64, num_rows=20)
    assert "web/lt32k.bin" in caught.value.where
