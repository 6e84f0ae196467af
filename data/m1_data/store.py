"""Prepared data opened for reading: one indexed token file per cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from m1_data.mix import Cell


class Reader(Protocol):
    """Documents of one cell: ``indexed.IndexedReader``, or arrays in memory."""

    @property
    def lengths(self) -> npt.NDArray[np.integer[Any]]:
        """Tokens per document."""
        ...

    def get(self, document: int, start: int, length: int, /) -> npt.NDArray[np.integer[Any]]:
        """Token ids ``start`` to ``start + length`` of ``document``, clipped at its end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """Readers per cell, in a fixed order, and what the ids mean."""

    readers: Mapping[Cell, Reader]
    vocab_size: int
    eod_id: int
    """End-of-document token; also used as padding, where it is never trained."""
    content_hash: str
    """Changes whenever any token changes."""


def open_store(data_dir: Path) -> Store:
    raise NotImplementedError
