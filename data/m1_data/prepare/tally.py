"""The steps of a preparation report here: counts per source, and progress while they work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[str, str, int, int], None]
"""A progress callback takes (phase, source, documents, UTF-8 bytes); phase is reuse, train, encode, generate or done."""

HARMLESS_REASONS = ("empty", "duplicate", "blank line")
"""Reasons for a rejection that do not make a record unusable: it does not count against ``data.max_bad_share``."""


@dataclass(slots=True)
class Tally:
    """The counts of one source's records. Every step that rejects or repairs a record counts it here."""

    records: int = 0
    """Number of records read."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of records that gave no document, by reason."""
    noted: Counter[str] = field(default_factory=Counter)
    """Number of repairs and remarks on records that gave one, by kind."""

    @property
    def bad(self) -> int:
        """The number of records that are unusable, not merely empty or duplicated."""
        return sum(count for reason, count in self.rejected.items() if reason not in HARMLESS_REASONS)
