"""What a model reads of a sample, as text, and which parts of it are trained."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m1_data.arrays import Ints
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
        encoded = self._store.tokens(number)
        ids, trained = encoded.ids[:seq_len], encoded.trained[:seq_len]
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        return [PreviewSpan(self._text(ids, begin, end), bool(trained[begin])) for begin, end in pairwise(edges)]

    def _text(self, ids: Ints, begin: int, end: int) -> str:
        """Decoded behind the token before it: some tokenizers write a space less at the beginning of a text."""
        before = max(0, begin - 1)
        lead, whole = (
            self._tokenizer.decode(ids[before:to].tolist(), skip_special_tokens=False) for to in (begin, end)
        )
        return str(whole[len(lead) :])
