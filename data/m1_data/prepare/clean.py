"""Text cleaning that loses nothing a model should see, and exact deduplication."""

from __future__ import annotations

import re

import xxhash

from m1_data.prepare.reader import Tally

_VISIBLE = re.compile("[^\\s\u200b-\u200d\u2060\ufeff]")
"""Anything but white space and zero-width characters."""


def clean(text: str, tally: Tally) -> str | None:
    """Unix line ends, no byte-order mark; None (and counted) when nothing but white space is left."""
    if text.startswith("\ufeff"):
        tally.noted["byte-order mark"] += 1
        text = text.lstrip("\ufeff")
    if "\r" in text:
        tally.noted["carriage returns"] += 1
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        tally.noted["NUL character kept"] += 1
    if not _VISIBLE.search(text):
        tally.rejected["empty"] += 1
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        tally.rejected["lone surrogate"] += 1
        return None
    return text


HELD_OUT_ONE_IN = 32


def may_be_held_out(text: str) -> bool:
    """Whether the text's hash is among the one in ``HELD_OUT_ONE_IN`` that may stay out of training."""
    return _digest(text)[-1] % HELD_OUT_ONE_IN == 0


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.strip().encode("utf-8"))


class ExactDedup:
    """Remembers a 128-bit hash of every text, white space at its ends aside; the first copy stays."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.fresh: list[bytes] = []
        """Hashes added since ``fresh`` was last emptied."""

    def is_new(self, text: str) -> bool:
        """Whether no equal text came before."""
        digest = _digest(text)
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self.fresh.append(digest)
        return True

    def restore(self, digests: bytes) -> None:
        """Take over the hashes of an earlier run, concatenated."""
        self._seen.update(digests[i : i + 16] for i in range(0, len(digests), 16))
