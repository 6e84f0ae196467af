"""What a model reads of a sample, as text, and which parts of it are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m1_data.sft.store import SampleStore
from m1_data.tokenizer import text_tokenizer


class PreviewSpan(NamedTuple):
    """A part of a text with one mask value."""

    text: str
    trained: bool


class Preview:
    """Turns samples of a store back into text.

    Args:
        tokenizer_dir: the folder of the tokenizer that encoded them.
    """

    def __init__(self, store: SampleStore, tokenizer_dir: Path) -> None:
        self._store = store
        self._tokenizer: Any = text_tokenizer((tokenizer_dir / "tokenizer.json").read_bytes())

    def spans(self, number: int, seq_len: int) -> list[PreviewSpan]:
        """Return the first ``seq_len`` tokens of a sample, decoded and cut where the mask changes."""
        ids, trained = (part[:seq_len] for part in self._store.tokens(number))
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        # Decoded from the beginning each time: some tokenizers write a space less at the beginning of a text.
        texts = [self._tokenizer.decode(ids[:edge].tolist(), skip_special_tokens=False) for edge in edges]
        return [
            PreviewSpan(text[len(before) :], bool(trained[edge]))
            for before, text, edge in zip(texts, texts[1:], edges, strict=False)
        ]
