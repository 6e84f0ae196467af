"""A small tokenizer with the control tokens of a chat, and a template for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTROL = ["<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>", "<think>", "</think>", "<pad>"]
SOURCE = (
    "{% for m in messages %}<beginning_of_sentence>{{ m.role }}\n{{ m.content }}<end_of_sentence>\n{% endfor %}"
    "{% if add_generation_prompt %}<beginning_of_sentence>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, control: list[str] = CONTROL, **config: Any) -> Path:
    """One id for each byte, then the control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<beginning_of_sentence>", "eos_token": "<end_of_sentence>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    return folder
