"""The steps of a preparation report here: counts per source, and progress while they work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[str, str, int, int], None]
"""A progress callback takes (phase, source, documents, UTF-8 bytes); phase is reuse, train, encode, generate or done."""


@dataclass(slots=True)
class Tally:
    """The counts of one source's records. Every step that rejects or repairs a record counts it here."""

    records: int = 0
    """Number of records read."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of records that gave no document, by reason: the unusable ones, and those that are empty, duplicated or filtered
    out."""
    noted: Counter[str] = field(default_factory=Counter)
    """Number of repairs and remarks on records that gave one, by kind."""
    first_places: dict[str, str] = field(default_factory=dict)
    """The place of the first unusable record, by reason. Only these reasons count against ``data.max_bad_share``."""
    place: str = ""
    """File and line of the record that the steps look at now."""
    files: tuple[str, ...] = ()
    """The files that are read, or the folders of the formats files and packages."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of files and folders that are not read, by kind (``SourceFiles.left_out``)."""

    def begin(self, place: str) -> None:
        """Count a record; those that the steps reject from now on are this one."""
        self.records += 1
        self.place = place

    def reject(self, reason: str, detail: str = "") -> None:
        """Count the present record as unusable; ``detail`` is shown beside the first place of this reason."""
        self.rejected[reason] += 1
        if reason not in self.first_places:
            self.first_places[reason] = f"{self.place} ({detail})" if detail else self.place

    @property
    def bad(self) -> int:
        """The number of records that are unusable, not merely empty, duplicated or filtered out."""
        return sum(self.rejected[reason] for reason in self.first_places)
