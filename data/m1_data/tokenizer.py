"""Loads, trains and stores the tokenizer; every problem is one clear error."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.spec import TokenizerSpec

EOD_NAMES = ("<end_of_document>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
CONTROL_TOKENS = (
    "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>", "<think>", "</think>", "<pad>",
)  # fmt: skip
_LONG_CHARS = 20_000
"""Some 15 ms of encoding; of short texts a batch of one costs more than the text."""
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer as its JSON, and what preparation needs to know of it."""

    json_bytes: bytes
    reference: Any
    """The tokenizers library's object; control tokens in text stay text."""
    vocab_size: int
    """One more than the largest token id."""
    eod_id: int
    eod_token: str
    folder: Path | None
    """The folder it came from, for its companion files; None for a trained one."""


def load_tokenizer(path: Path, eod_token: str) -> LoadedTokenizer:
    """Read ``tokenizer.json`` (the file, or a Hugging Face folder that holds it).

    Raises:
        DataError: missing, not a tokenizer, or without a usable end-of-document token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    where, fix = str(file), "set tokenizer.path to a tokenizer.json or a Hugging Face tokenizer folder"
    try:
        return _loaded(file.read_bytes(), eod_token, where, file.parent)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer: {error}", where=where, fix=fix) from error
    except DataError as error:
        error.where = error.where or where
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"not a tokenizer the tokenizers library can load: {error}", where=where, fix=fix) from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens. Other threads go on while a long one is encoded."""
    if len(text) < _LONG_CHARS:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)  # encode keeps the interpreter's lock
    return list(encoded.ids)


def text_tokenizer_json(data: bytes) -> dict[str, Any]:
    """Return the contents of a ``tokenizer.json`` without what its last user left in it.

    Truncation, padding and a post-processor say how one program fills its batches. Documents and conversations are encoded
    whole, with nothing added.

    Raises:
        DataError: the model drops merges at random, so that the same text has other ids each time.
    """
    raw: dict[str, Any] = json.loads(data)
    if dropout := (raw.get("model") or {}).get("dropout"):
        raise DataError(
            f"the tokenizer's model has dropout = {dropout}, so the same text gets other ids each time",
            fix='set "dropout": null under "model" in tokenizer.json',
        )
    return {**raw, "truncation": None, "padding": None, "post_processor": None}


def text_tokenizer(data: bytes) -> Any:
    """Return the tokenizers library's object for texts: every text is encoded whole, and control tokens in it stay text.

    Added tokens that are not special are part of the vocabulary and are found in texts.

    Raises:
        DataError: see ``text_tokenizer_json``.
        Exception: not a tokenizer; tokenizers raises no other class.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(text_tokenizer_json(data)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _loaded(data: bytes, eod_token: str, where: str, folder: Path | None) -> LoadedTokenizer:
    reference = text_tokenizer(data)
    name, eod_id = _find_eod(reference, eod_token, where)
    if eod_id in reference.encode(name, add_special_tokens=False).ids:
        raise DataError(
            f"the text {name!r} inside a document would become the end-of-document token {eod_id}",
            where=where,
            fix="mark it as special in the tokenizer's added_tokens, or set tokenizer.eod_token to another token",
        )
    size = max(
        reference.get_vocab_size(with_added_tokens=False), 1 + max(reference.get_added_tokens_decoder(), default=0)
    )
    if reference.id_to_token(size - 1) is None or reference.id_to_token(size) is not None:
        size = 1 + max(reference.get_vocab(with_added_tokens=True).values())  # ids with gaps: look at every one
    return LoadedTokenizer(data, reference, size, eod_id, name, folder)


def _find_eod(tokenizer: Any, wanted: str, where: str) -> tuple[str, int]:
    for name in (wanted,) if wanted else EOD_NAMES:
        if (index := tokenizer.token_to_id(name)) is not None:
            return name, int(index)
    raise DataError(
        f"the tokenizer has no token {wanted!r}" if wanted else "the tokenizer has no end-of-document token",
        where=where,
        fix=f"set tokenizer.eod_token to one it has (looked for {', '.join((wanted,) if wanted else EOD_NAMES)})",
    )


def train_tokenizer(texts: Iterator[str], spec: TokenizerSpec) -> LoadedTokenizer:
    """Train a byte-level BPE and return it; the same texts give the same tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # One digit at a time keeps arithmetic regular; the rest is the usual byte-level split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _loaded(tokenizer.to_str().encode(), "", "trained tokenizer", None)


SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_tokenizer(tokenizer: LoadedTokenizer, out: Path) -> dict[str, str]:
    """Write a folder that transformers loads: the unchanged JSON and its companion files, copied or made.

    Returns:
        The SHA-256 of each file by its name.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_bytes(tokenizer.json_bytes)
    for name in COMPANION_FILES:
        if tokenizer.folder and (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, out / name)
    if not (out / "tokenizer_config.json").exists():
        names = {token.content for token in tokenizer.reference.get_added_tokens_decoder().values()}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<end_of_sentence>" if "<end_of_sentence>" in names else tokenizer.eod_token,
        }
        if "<beginning_of_sentence>" in names:
            config["bos_token"] = "<beginning_of_sentence>"
        config["pad_token"] = "<pad>" if "<pad>" in names else tokenizer.eod_token
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}
