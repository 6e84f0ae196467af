"""The 7,473 training problems of GSM8K as conversations: every count is exact, with the released tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from support.sft_data import sft_dataset
from support.shared_data import shared_data, unpack_zst

from m1_data.chat.encoder import default_template

PROBLEMS = 7473
SEQ_LEN = 4096


def problems(path: Path) -> list[list[dict[str, Any]]]:
    """The texts, cut before the answer."""
    with path.open("rb") as file:
        rows = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        texts = [json.loads(row)["text"] for row in rows]
    pairs = [text.partition("\nAnswer: ") for text in texts]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, _, answer in pairs
    ]


@pytest.mark.faults
def test_every_count_is_exact(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    unpack_zst(shared_data() / "tokenizers" / "minimax_m1_200k.json.zst", tmp_path / "tokenizer.json")
    names = {"bos_token": "<beginning_of_sentence>", "eos_token": "<end_of_sentence>", "pad_token": "<end_of_document>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    talks = problems(shared_data() / "corpus" / "stem_gsm8k_train.jsonl.zst")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": t, "domain": "math"}) + "\n" for t in talks))
    data = sft_dataset([tmp_path / "chats.jsonl"], tokenizer_dir=tmp_path, seq_len=SEQ_LEN, seed=1)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    (end,) = oracle.convert_tokens_to_ids(["<end_of_sentence>"])
    tokens = trained = ends = other = 0
    for number, messages in enumerate(talks):
        ids, mask = data.store.tokens(number)
        render = {"chat_template": default_template(), "return_dict": True}
        theirs = oracle.apply_chat_template(messages, **render)["input_ids"]
        prompt = oracle.apply_chat_template(messages[:1], add_generation_prompt=True, **render)["input_ids"]
        tokens, trained = tokens + len(ids), trained + int(mask.sum())
        ends += int((ids[mask] == end).sum())
        assert np.flatnonzero(mask).tolist() == list(range(len(prompt), len(ids) - 1)), (
            "all behind the prompt but the last"
        )
        assert oracle.decode(ids.tolist()) == oracle.decode(theirs)
        other += ids.tolist() != theirs
    stats = data.stats
    assert (stats.read, stats.samples, stats.conversations, stats.bad_rows) == (PROBLEMS, PROBLEMS, PROBLEMS, {})
    assert (stats.tokens, stats.trained_tokens, ends) == (tokens, trained, PROBLEMS)
    assert other == 0
    assert [(d.domain, d.conversations, d.trained_tokens) for d in stats.domains] == [("math", PROBLEMS, trained)]
    seen = sorted(number for row in range(len(data)) for number in data.numbers(row))
    assert seen == list(range(PROBLEMS)), "a pass has each once"
    assert stats.rows == len(data) >= -(-tokens // SEQ_LEN)
