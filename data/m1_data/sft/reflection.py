"""Words with which a text checks itself: fine-tuning is there to plant them (MiniMax-M1, section 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from m1_data.arrays import Ints
from m1_data.chat.conversations import Conversation


class PatternCounter:
    """Counts patterns in texts.

    Args:
        patterns: words or phrases. They match whole words, in upper or lower case, with any white space between words. Where two
            match at the same place the longer one counts; matches do not overlap.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._places = {" ".join(p.lower().split()): n for n, p in enumerate(patterns)}
        by_length = sorted(self._places, key=len, reverse=True)
        forms = "|".join(r"\s+".join(map(re.escape, form.split())) for form in by_length)
        self._found = re.compile(rf"(?<!\w)(?:{forms})(?!\w)" if forms else r"(?!)", re.IGNORECASE)
        self._count = len(patterns)

    def count(self, texts: Iterable[str]) -> Ints:
        """Return the number of matches of each pattern in all texts together, int64 ``[patterns]``."""
        counts = np.zeros(self._count, dtype=np.int64)
        for text in texts:
            for match in self._found.findall(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
                counts[self._places[" ".join(match.lower().split())]] += 1
        return counts


def trained_texts(conversation: Conversation) -> Iterable[str]:
    """Yield the reasoning and the contents of the turns that are trained."""
    for message in conversation.messages:
        if message.role == "assistant" and message.train:
            yield from filter(None, (message.reasoning, message.content))
