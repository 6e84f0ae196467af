"""Megatron's IndexedDataset files: ``.bin`` holds token ids back to back, ``.idx`` where each document starts.

Layout of ``.idx``, little endian (``megatron/core/datasets/indexed_dataset.py``): ``MMIDIDX\\0\\0``, version u64 = 1,
dtype code u8, sequence count u64, document count u64 (documents + 1), then int32 lengths, int64 byte pointers, int64
document indices. One sequence is one document here. ``.blocks`` (ours) holds hashes of ``.bin``: see ``blocks``.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m1_data.errors import DataError
from m1_data.storage.blocks import RESTORE, BlockHasher, VerifiedBlocks

_MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[int, Any] = {4: np.int32, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype that Megatron chooses for a vocabulary (``DType.optimal_dtype`` in its ``indexed_dataset.py``)."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class IndexedWriter:
    """Writes one shard. ``close`` makes it complete and returns its counts and hashes."""

    def __init__(self, prefix: Path, vocab_size: int, eod_id: int) -> None:
        self.prefix, self.dtype = prefix, token_dtype(vocab_size)
        self._eod = np.array([eod_id], dtype=self.dtype).tobytes()
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115 - lives as long as the writer
        self._sha, self._blocks = hashlib.sha256(), BlockHasher()
        self._lengths: list[int] = []

    def add(self, ids: NDArray[Any]) -> None:
        """Append one document, integer ids ``[tokens]`` that fit the shard's dtype, and an end-of-document token."""
        data = ids.astype(self.dtype, copy=False).tobytes() + self._eod
        self._bin.write(data)
        self._sha.update(data)
        self._blocks.update(data)
        self._lengths.append(len(ids) + 1)

    def close(self) -> dict[str, Any]:
        """Write the index and the block hashes, and flush all files; return documents, tokens and each file's SHA-256."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
        index = b"".join(
            [
                _HEADER.pack(_MAGIC, 1, 8 if self.dtype is np.uint16 else 4, len(lengths), len(lengths) + 1),
                lengths.tobytes(),
                (pointers * np.dtype(self.dtype).itemsize).tobytes(),
                np.arange(len(lengths) + 1, dtype=np.int64).tobytes(),
            ]
        )
        blocks = self._blocks.finish()
        for suffix, content in ((".idx", index), (".blocks", blocks)):
            with open(f"{self.prefix}{suffix}", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "bin_sha256": self._sha.hexdigest(),
            "idx_sha256": hashlib.sha256(index).hexdigest(),
            "blocks_sha256": hashlib.sha256(blocks).hexdigest(),
        }


class IndexedReader:
    """Reads a shard through a memory map.

    Args:
        prefix: path of the shard without a suffix.
        index: content of ``<prefix>.idx`` when it has been read; else it is read here.
        blocks: verifies each block of the token file before it is first read from; None when the whole file was verified, or
            was just written by this process.

    Raises:
        DataError: a file is missing, truncated or not Megatron's, or the index points to other places than its lengths say.
    """

    def __init__(self, prefix: Path, index: bytes | None = None, blocks: VerifiedBlocks | None = None) -> None:
        self.prefix, self._blocks = prefix, blocks
        index = _read(Path(f"{prefix}.idx")) if index is None else index
        if len(index) < _HEADER.size:
            raise self._broken("the index is shorter than its header")
        magic, version, code, sequences, documents = _HEADER.unpack_from(index)
        if magic != _MAGIC or version != 1 or code not in _CODES:
            raise self._broken(f"not a Megatron index (magic {magic!r}, version {version}, dtype code {code})")
        if documents != sequences + 1 or len(index) != _HEADER.size + 20 * sequences + 8:
            raise self._broken(f"the index has {len(index)} bytes, its {sequences} documents need another size")
        self.dtype = np.dtype(_CODES[code])
        self._size = self.dtype.itemsize
        self.lengths = np.frombuffer(index, np.int32, sequences, _HEADER.size)
        pointers = np.frombuffer(index, np.int64, sequences, _HEADER.size + 4 * sequences)
        order = np.frombuffer(index, np.int64, sequences + 1, _HEADER.size + 12 * sequences)
        self._starts = np.zeros(sequences + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self._starts[1:], dtype=np.int64)
        if (
            self.lengths.min(initial=1) < 1
            or (pointers != self._starts[:-1] * self._size).any()
            or (order != np.arange(sequences + 1)).any()
        ):
            raise self._broken("the index is damaged: its lengths and pointers do not describe documents back to back")
        tokens = int(self._starts[-1])
        size = os.path.getsize(f"{prefix}.bin") if os.path.isfile(f"{prefix}.bin") else -1
        if size != tokens * self._size:
            raise self._broken(f"the token file has {size} bytes, the index tells another size")
        self._ids = np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, document: int, start: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """Return the token ids ``[start, start + length)`` of a document, clipped at its end, as int64.

        Raises:
            DataError: the bytes are not those that were written.
        """
        size = int(self.lengths[document])
        end = size if length is None else min(size, start + length)
        first = int(self._starts[document])
        if self._blocks is not None:
            self._blocks.verify((first + start) * self._size, (first + end) * self._size)
        return self._ids[first + start : first + end].astype(np.int64)

    def _broken(self, what: str) -> DataError:
        return DataError(what, where=str(self.prefix), fix=RESTORE)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read a shard: {error}", where=str(path), fix=RESTORE) from error
