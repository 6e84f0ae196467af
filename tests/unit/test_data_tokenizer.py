"""Tokenizers with traps: what a tokenizer.json may hold, and how far the ids of a fast engine are proved."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_tokenizer import write_tokenizer

from m1_data.errors import DataError
from m1_data.prepare import encode
from m1_data.prepare.encode import Encoder, is_verified, tokenize_and_verify
from m1_data.tokenizer import encode_text, load_tokenizer, text_tokenizer

EOD = "<|endoftext|>"
LONG = "one two  three four " * 20


def added(content: str, index: int, **more: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content, **flags, **more}


def load(
    folder: Path, tokens: tuple[dict[str, Any], ...] = (), model: dict[str, Any] | None = None, **more: Any
) -> Any:
    """A byte-level tokenizer with ids 0 to 255, the end-of-document token 256, and what a test adds."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [added(EOD, 256, special=True), *tokens]
    raw["model"] |= model or {}
    (folder / "tokenizer.json").write_text(json.dumps(raw | more))
    return load_tokenizer(folder, "")


TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None,
    "pad_id": 256, "pad_type_id": 0, "pad_token": EOD,
}  # fmt: skip
TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize(
    "setting",
    [{"truncation": TRUNCATION}, {"padding": PADDING}, {"post_processor": TWICE}],
    ids=lambda s: next(iter(s)),
)
def test_no_document_is_cut_padded_or_added_to(tmp_path: Path, engine: str, setting: dict[str, Any]) -> None:
    ids, offsets = Encoder(load(tmp_path, **setting), engine).encode([LONG, "a"])
    assert offsets.tolist() == [0, len(LONG), len(LONG) + 1]
    assert ids.tolist() == Encoder(load(tmp_path), "tokenizers").encode([LONG, "a"])[0].tolist()


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
def test_added_tokens_that_are_not_special_are_vocabulary(tmp_path: Path, engine: str) -> None:
    """Special ones stay text, so that no document can end itself."""
    tokenizer = load(tmp_path, (added("<think>", 257), added("   ", 258, normalized=True)))
    ids, offsets = Encoder(tokenizer, engine).encode(["a<think>b", "a    b", f"a{EOD}b"])
    parts = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    byte = tokenizer.reference.token_to_id
    assert parts[0] == [byte("a"), 257, byte("b")]
    assert parts[1] == [byte("a"), 258, byte("Ġ"), byte("b")]
    assert len(parts[2]) == len(EOD) + 2
    assert 256 not in parts[2]


def test_an_engine_that_reads_an_added_token_differently_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, (added("<think>", 257, single_word=True),))
    with pytest.raises(
        DataError, match="gigatoken and tokenizers disagree on a text that begins 'a<think>b'"
    ) as caught:
        Encoder(tokenizer, "gigatoken")
    assert caught.value.fix.startswith('set data.engine = "tokenizers"')
    assert len(Encoder(tokenizer, "tokenizers").encode(["a<think>b"])[0]) == 9


def test_a_normalizer_that_an_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, normalizer={"type": "Lowercase"})
    with pytest.raises(DataError, match="gigatoken cannot load this tokenizer"):
        Encoder(tokenizer, "gigatoken")
    byte = tokenizer.reference.token_to_id
    assert Encoder(tokenizer, "tokenizers").encode(["A"])[0].tolist() == [byte("a")]


def test_tokenizers_without_one_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dropout = 0\.5") as caught:
        load(tmp_path, model={"dropout": 0.5})
    assert caught.value.where == str(tmp_path / "tokenizer.json")
    load(tmp_path, (added("</s>", 257),))  # not special: found in texts
    with pytest.raises(DataError, match="inside a document would become the end-of-document token 257"):
        load_tokenizer(tmp_path, "</s>")


def test_the_proof_reaches_from_the_first_to_the_last_document() -> None:
    picked = [n for n in range(100_000) if is_verified(n, 128)]
    assert picked[:128] == list(range(128))
    assert np.bincount(np.array(picked) // 1_000, minlength=100).min() >= 1, "one in every 1,000"
    assert sum(n < 1_000 for n in picked) > 300
    assert sum(n >= 90_000 for n in picked) >= 15
    assert sum(is_verified(n, 0) for n in range(50_000)) == 50, "verify_docs is the beginning; the sample stays"


def test_a_difference_at_the_end_of_a_source_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is right for 9,000 documents, then wrong in their last character only."""
    tokenizer = load(tmp_path)
    encoder = Encoder(tokenizer, "gigatoken")
    right = encoder._encode

    def wrong(texts: list[str]) -> Any:
        return right([t[:-1] + "?" if t.endswith("9,") else t for t in texts])

    monkeypatch.setattr(encoder, "_encode", wrong)
    texts = [f"{n} " + "x" * (7_000 if n % 500 == 0 else 9) + ("9," if n >= 9_000 else "") for n in range(10_000)]
    with pytest.raises(DataError, match="disagree"):
        list(tokenize_and_verify(texts, encoder, verify_docs=128))
    first = list(tokenize_and_verify(texts[:9_000], encoder, verify_docs=128))
    assert sum(batch.verified_ids for batch in first) > 300 * 12
    assert encode._pieces("a" * 2_000 + "b" * 5_000 + "c" * 2_000) == ["a" * 2_000, "b" * 2_000, "c" * 2_000]


def test_others_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    """And its ids are those of the library's plain call."""
    tokenizer = text_tokenizer((write_tokenizer(tmp_path) / "tokenizer.json").read_bytes())
    text = "Wait, <think> über 数学. " * 40_000
    done: list[list[int]] = []
    worker = threading.Thread(target=lambda: done.append(encode_text(tokenizer, text)))
    began = last = time.perf_counter()
    longest = 0.0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert longest < 0.5 * (last - began), "the interpreter was held all the time"
    assert done[0] == tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_text(tokenizer, text[:20]) == done[0][: len(encode_text(tokenizer, text[:20]))]
