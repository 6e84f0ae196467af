"""Prepared data opened for reading: one indexed token file per cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from m1_data.errors import DataError
from m1_data.storage.cell import Cell
from m1_data.storage.indexed import IndexedReader
from m1_data.storage.manifest import load_manifest


class Reader(Protocol):
    """Reads the documents of one cell: an ``indexed.IndexedReader``, or arrays in memory."""

    @property
    def lengths(self) -> npt.NDArray[np.integer[Any]]:
        """Number of tokens of each document, ``[documents]``; the end-of-document token is counted."""
        ...

    def get(self, document: int, start: int, length: int, /) -> npt.NDArray[np.integer[Any]]:
        """Return the token ids ``start`` to ``start + length`` of ``document``, clipped at its end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """The readers of all cells, in a fixed order, and what the ids mean."""

    readers: Mapping[Cell, Reader]
    vocab_size: int
    eod_id: int
    """End-of-document token; also used as padding, where it is never trained."""
    content_hash: str
    """A hash that changes whenever any token changes."""


def open_store(data_dir: Path, *, held_out: bool = False) -> Store:
    """Open the shards of a folder written by ``m1 prepare-data``: those to train on, or those held out from it.

    Raises:
        DataError: no prepared data there, or a shard that is missing, truncated or not what the manifest says.
    """
    manifest = load_manifest(data_dir)
    readers: dict[Cell, Reader] = {}
    for shard in manifest.held_out if held_out else manifest.shards:
        reader = IndexedReader(data_dir / shard.prefix)
        tokens = int(reader.lengths.sum(dtype=np.int64))
        if (len(reader), tokens) != (shard.documents, shard.tokens):
            raise DataError(
                f"the shard has {len(reader)} documents and {tokens} tokens, the manifest tells "
                f"{shard.documents} and {shard.tokens}",
                where=str(reader.prefix),
                fix="run m1 prepare-data again",
            )
        readers[Cell(shard.source, shard.domain, shard.bucket)] = reader
    return Store(
        readers=readers,
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        content_hash=manifest.content_hash,
    )
