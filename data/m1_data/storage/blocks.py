"""Hashes of a token file in blocks, so that damage is found where it is read, without reading the whole file first.

``<prefix>.blocks`` lies beside ``<prefix>.bin``, little endian: ``M1BLOCKS``, bytes of a block u64, bytes of the token file
u64, then one XXH3-128 (16 bytes) for each block, the last one shorter. The manifest holds the SHA-256 of this file. XXH3
finds damage, not an adversary, at about the speed of memory.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import xxhash

from m1_data.errors import DataError, shown

BLOCK_BYTES = 256 * 1024
"""A block costs 0.1 ms to verify; 100 GB of tokens have 6 MB of block hashes."""
RESTORE = "restore the file from a copy, or run m1 prepare-data: it finds the damage and prepares the data again"
_MAGIC = b"M1BLOCKS"
_HEADER = struct.Struct("<8sQQ")
_HASH_BYTES = 16


class BlockHasher:
    """Hashes the bytes of a token file while they are written."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes, self._bytes = block_bytes, 0
        self._hashes: list[bytes] = []
        self._block = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray) -> None:
        """Take the next bytes of the file."""
        view = memoryview(data)
        while len(view):
            part = view[: self._block_bytes - self._bytes % self._block_bytes]
            self._block.update(part)
            self._bytes += len(part)
            view = view[len(part) :]
            if self._bytes % self._block_bytes == 0:
                self._hashes.append(self._block.digest())
                self._block.reset()

    def finish(self) -> bytes:
        """Return the content of ``<prefix>.blocks``; nothing can be added afterwards."""
        if self._bytes % self._block_bytes:
            self._hashes.append(self._block.digest())
        return _HEADER.pack(_MAGIC, self._block_bytes, self._bytes) + b"".join(self._hashes)


class VerifiedBlocks:
    """The blocks of one token file, and which of them this process has read and found to be what was written.

    Args:
        path: the token file.
        hashes: content of its ``.blocks`` file, which has been verified itself.
        fix: what a person can do about damage.

    Raises:
        DataError: the hashes are not those of a file of this size.
    """

    def __init__(self, path: Path, hashes: bytes, *, fix: str = RESTORE) -> None:
        self._path, self._fix = path, fix
        magic, self._block_bytes, self._bytes = _HEADER.unpack_from(hashes.ljust(_HEADER.size, b"\0"))
        count = -(-self._bytes // max(1, self._block_bytes))
        size = os.path.getsize(path) if path.is_file() else -1
        if magic != _MAGIC or len(hashes) != _HEADER.size + _HASH_BYTES * count or size != self._bytes:
            raise DataError(
                f"the token file has {size} bytes, its block hashes are those of {self._bytes} bytes",
                where=shown(path),
                fix=self._fix,
            )
        self._hashes = hashes
        self._is_verified = np.zeros(count, dtype=np.bool_)
        self._left = count

    def verify(self, start: int, end: int) -> None:
        """Verify the blocks that hold the bytes ``[start, end)`` and have not been verified by this process.

        Raises:
            DataError: a block is not what was written, or cannot be read; file and bytes are named.
        """
        if not self._left or start >= end:
            return
        first, last = start // self._block_bytes, (end - 1) // self._block_bytes
        wanted = np.flatnonzero(~self._is_verified[first : last + 1])
        if not len(wanted):
            return
        try:
            with self._path.open("rb", buffering=0) as file:
                for block in (first + wanted).tolist():
                    file.seek(block * self._block_bytes)
                    self._verify_block(block, file.read(self._block_bytes))
        except OSError as error:
            raise DataError(f"cannot read a shard: {error}", where=shown(self._path), fix=self._fix) from error

    def verify_all(self) -> None:
        """Verify the whole file.

        Raises:
            DataError: as ``verify``.
        """
        self.verify(0, self._bytes)

    def _verify_block(self, block: int, data: bytes) -> None:
        at = _HEADER.size + _HASH_BYTES * block
        if xxhash.xxh3_128_digest(data) != self._hashes[at : at + _HASH_BYTES]:
            begin = block * self._block_bytes
            raise DataError(
                f"the token file is damaged: bytes {begin:,} to {min(begin + self._block_bytes, self._bytes):,} "
                f"(block {block}) are not what was written",
                where=shown(self._path),
                fix=self._fix,
            )
        self._is_verified[block] = True
        self._left -= 1
