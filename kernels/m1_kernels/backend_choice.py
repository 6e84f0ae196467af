"""The backend that an operator runs on, and the reason, as data."""

from __future__ import annotations

from typing import NamedTuple


class BackendChoice(NamedTuple):
    """The backend that an operator runs on, and why. An operator that is given a choice takes it without a check."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"
