"""Prepared data opened for reading: one indexed token file per cell, and nothing in it that was not written.

The manifest, the tokenizer's files, the indices and the block hashes are small: opening verifies them whole. So it does with
the token files while all of them together have at most ``WHOLE_BYTES``. Of larger data each process verifies a block when it
first reads from it: the start stays quick, and no damaged byte is ever handed out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from m1_data.errors import DataError
from m1_data.storage.blocks import RESTORE, VerifiedBlocks
from m1_data.storage.cell import Cell
from m1_data.storage.indexed import IndexedReader
from m1_data.storage.manifest import MANIFEST, Manifest, ShardEntry, load_manifest
from m1_data.tokenizer import load_tokenizer

WHOLE_BYTES = 4 * 2**30
"""Token files of this size together are verified at the start: a second or two, once they are in the page cache."""
TOKENIZER = "tokenizer"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A prepared data folder whose small files are verified, and its token files too or when they are read."""

    folder: Path
    manifest: Manifest
    training: Store
    held_out: Store
    num_bytes: int
    """Bytes of all token files."""
    verified: str
    """When and how the token files are verified, in words."""
    seconds: float
    """How long opening took."""


def open_prepared(data_dir: Path, *, whole_bytes: int = WHOLE_BYTES) -> PreparedData:
    """Verify and open a folder written by ``m1 prepare-data``.

    Args:
        whole_bytes: token files of at most this size together are verified now, larger ones block by block when read.

    Raises:
        DataError: no prepared data there, or any file of it that is missing, cut or not what was written.
    """
    began = time.perf_counter()
    manifest = load_manifest(data_dir)
    verify_tokenizer(data_dir, manifest)
    shards = (*manifest.shards, *manifest.held_out)
    num_bytes = sum(_size(data_dir / f"{shard.prefix}.bin") for shard in shards)
    whole = num_bytes <= whole_bytes or not manifest.has_hashes
    training, held_out = (_open(data_dir, manifest, part, whole) for part in (manifest.shards, manifest.held_out))
    if not manifest.has_hashes:
        verified = (
            "compared whole with the SHA-256 of an older version, which did not record the keys and files that the data was "
            "made from: they are not compared; m1 prepare-data writes the present format"
        )
    else:
        verified = "verified whole" if whole else "each block is verified when it is first read"
    return PreparedData(
        folder=data_dir,
        manifest=manifest,
        training=training,
        held_out=held_out,
        num_bytes=num_bytes,
        verified=verified,
        seconds=time.perf_counter() - began,
    )


def open_store(data_dir: Path, *, held_out: bool = False) -> Store:
    """Open the shards of a folder written by ``m1 prepare-data``: those to train on, or those held out from it.

    Raises:
        DataError: as ``open_prepared``.
    """
    data = open_prepared(data_dir)
    return data.held_out if held_out else data.training


def verify_tokenizer(data_dir: Path, manifest: Manifest) -> None:
    """Compare the files of the tokenizer with what was written.

    Raises:
        DataError: one is missing or changed, or there is one more; or it does not fit a manifest without a hash of its own.
    """
    folder = data_dir / TOKENIZER
    expected = manifest.tokenizer_files or {"tokenizer.json": manifest.tokenizer_sha256}
    for name, sha256 in expected.items():
        _verified_bytes(folder / name, sha256)
    if manifest.has_hashes:
        if more := sorted({p.name for p in folder.iterdir() if not p.name.startswith(".")} - expected.keys()):
            raise DataError(
                "m1 prepare-data did not write this file, which would change the tokenizer",
                where=str(folder / more[0]),
                fix="move it elsewhere",
            )
        return
    tokenizer = load_tokenizer(folder, manifest.eod_token)
    for name in ("vocab_size", "eod_id"):
        if getattr(tokenizer, name) != getattr(manifest, name):
            raise DataError(
                f"the manifest is damaged: {name} is {getattr(manifest, name)}, the tokenizer has {getattr(tokenizer, name)}",
                where=str(data_dir / MANIFEST),
                fix=RESTORE,
            )


def open_shard(data_dir: Path, shard: ShardEntry, *, whole: bool) -> IndexedReader:
    """Verify and open one shard.

    Args:
        whole: verify its token file now, and not when its blocks are read.

    Raises:
        DataError: a file of it is missing, cut or not what was written.
    """
    prefix = data_dir / shard.prefix
    index = _verified_bytes(Path(f"{prefix}.idx"), shard.idx_sha256)
    blocks: VerifiedBlocks | None = None
    if shard.blocks_sha256:
        hashes = _verified_bytes(Path(f"{prefix}.blocks"), shard.blocks_sha256)
        blocks = VerifiedBlocks(Path(f"{prefix}.bin"), hashes)
        if whole:
            blocks.verify_all()
    else:
        _verify_whole(Path(f"{prefix}.bin"), shard.bin_sha256)
    reader = IndexedReader(prefix, index, blocks)
    tokens = int(reader.lengths.sum(dtype=np.int64))
    if (len(reader), tokens) != (shard.documents, shard.tokens):
        raise DataError(
            f"the shard has {len(reader)} documents and {tokens} tokens, the manifest tells "
            f"{shard.documents} and {shard.tokens}",
            where=str(prefix),
            fix=RESTORE,
        )
    return reader


def _open(data_dir: Path, manifest: Manifest, shards: Iterable[ShardEntry], whole: bool) -> Store:
    return Store(
        readers={
            Cell(shard.source, shard.domain, shard.bucket): open_shard(data_dir, shard, whole=whole) for shard in shards
        },
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        content_hash=manifest.content_hash,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _verified_bytes(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError("the file is damaged: it is not what was written", where=str(path), fix=RESTORE)
    return content


def _verify_whole(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest != sha256:
        raise DataError("the token file is damaged: it is not what was written", where=str(path), fix=RESTORE)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read a file of the prepared data: {error.strerror}", where=str(path), fix=RESTORE)
