"""Step 2, clean: repairs to a text that lose nothing a model should see."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from m1_data.prepare.tally import Tally

_VISIBLE = re.compile("[^\\s\u200b-\u200d\u2060\ufeff]")
"""Matches anything but white space and zero-width characters."""


def clean_texts(texts: Iterable[str], tally: Tally) -> Iterator[str]:
    """Yield every text as ``clean`` returns it, in order, without the rejected ones."""
    for text in texts:
        cleaned = clean(text, tally)
        if cleaned is not None:
            yield cleaned


def clean(text: str, tally: Tally) -> str | None:
    """Return the text with Unix line ends and without a byte-order mark.

    A text of nothing but white space, and one that UTF-8 cannot encode, gives None and is counted in ``tally.rejected``.
    Repairs are counted in ``tally.noted``.
    """
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
        tally.reject("lone surrogate")
        return None
    return text
