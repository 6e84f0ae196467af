"""Encoded samples on the disk: written once, verified, and read piece by piece by every rank and restart.

``manifest.json`` names the files with their hashes, and what was read. ``tokens.bin`` has the token ids of all samples, uint32
little endian, with the highest bit set where an id is a training target; ``tokens.blocks`` has its hashes (``storage.blocks``).
``samples.bin`` has one ``SAMPLE`` each, ``reflection.bin`` the matches of each pattern, uint32, ``where.bin`` the places, UTF-8.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from m1_data.chat.encoder import Encoded
from m1_data.chat.rows import refuse_files_of_bad_rows
from m1_data.errors import DataError
from m1_data.plain_values import from_plain
from m1_data.sft.encoding import SAMPLE, TRAINED, RowEncoder
from m1_data.sft.encoding_processes import encode_in_order
from m1_data.sft.samples import FORMAT, SampleSettings
from m1_data.storage.blocks import BlockHasher, VerifiedBlocks
from m1_data.storage.durable import flush, write_atomically
from m1_data.storage.ownership import refuse_to_replace, sweep_siblings, temporary_sibling

MANIFEST = "manifest.json"
_TOKENS, _BLOCKS, _SAMPLES, _REFLECTION, _WHERE = (
    "tokens.bin", "tokens.blocks", "samples.bin", "reflection.bin", "where.bin",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReadFile:
    """What a file of conversations turned out to be."""

    file: str
    dialect: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreManifest:
    """What a store holds, as its ``manifest.json`` says."""

    written_by: str
    key: str
    """``SampleSettings.key`` of what was read."""
    pad_id: int
    domains: tuple[str, ...]
    patterns: tuple[str, ...]
    hashes: dict[str, str]
    """SHA-256 of each file but the tokens, which have their blocks."""
    samples: int
    """Number of samples that may be trained."""
    files: tuple[ReadFile, ...]
    bad_rows: dict[str, int]
    unused_keys: dict[str, int]
    counts: dict[str, int]
    """See ``SampleTally``."""


class SampleStore:
    """The samples of a folder that ``write_store`` wrote. It keeps no tokens in memory.

    Raises:
        DataError: a file is missing, or is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self._fix = f"remove it: rm -r {folder}   (the next m1 sft reads the conversations again)"
        self.folder, manifest = folder, read_manifest(folder)
        if manifest is None:
            raise self._damaged(MANIFEST, "it is missing, or is of another version")
        self.manifest = manifest
        for name in manifest.hashes:
            if not (folder / name).is_file() or _sha256(folder / name) != manifest.hashes[name]:
                raise self._damaged(name, "it is not what was written")
        self.samples: npt.NDArray[Any] = self._column(_SAMPLES, SAMPLE)
        """``SAMPLE`` of each, ``[samples]``."""
        self.reflection: npt.NDArray[np.uint32] = self._column(_REFLECTION, np.dtype("<u4")).reshape(
            manifest.samples, len(manifest.patterns)
        )
        """Matches of each pattern, ``[samples, patterns]``."""
        self._blocks = VerifiedBlocks(folder / _TOKENS, (folder / _BLOCKS).read_bytes(), fix=self._fix)
        self._tokens = (folder / _TOKENS).open("rb", buffering=0)

    def tokens(self, number: int) -> Encoded:
        """Return the ids and the mask of a sample.

        Raises:
            DataError: they are not what was written.
        """
        begin, length = (int(self.samples[number][name]) for name in ("begin", "length"))
        self._blocks.verify(4 * begin, 4 * (begin + length))
        raw = np.frombuffer(os.pread(self._tokens.fileno(), 4 * length, 4 * begin), dtype="<u4")
        return Encoded((raw & ~TRAINED).astype(np.int64), (raw & TRAINED) != 0)

    def where(self, number: int) -> str:
        """Return the file and the row of a sample."""
        end = int(self.samples[number]["where_end"])
        begin = int(self.samples[number - 1]["where_end"]) if number else 0
        with (self.folder / _WHERE).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin).decode()

    def content_hash(self) -> str:
        """Return a SHA-256 that changes whenever an id or a mask changes."""
        return self.manifest.hashes[_BLOCKS]

    def _column(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = self.folder / name
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"the tokenized conversations are damaged: {what}", where=str(self.folder / name), fix=self._fix
        )


def read_manifest(folder: Path) -> StoreManifest | None:
    """Return the manifest of a store; None without one of this version."""
    try:
        raw = orjson.loads((folder / MANIFEST).read_bytes())
        manifest = from_plain(StoreManifest, raw, MANIFEST)
    except (OSError, ValueError):
        return None
    return manifest if manifest.written_by == _written_by() else None


def refuse_foreign_store(folder: Path) -> None:
    """Refuse to write a store where there is anything but one of ours.

    Raises:
        ConfigError: there is; nothing was written.
    """
    try:
        marked = b'"written_by":"m1 sft ' in (folder / MANIFEST).read_bytes()[:64]
    except OSError:
        marked = False
    refuse_to_replace(
        folder,
        what="the folder of tokenized conversations",
        marked=marked,
        ours=(MANIFEST, _TOKENS, _BLOCKS, _SAMPLES, _REFLECTION, _WHERE),
        fix="move it elsewhere",
    )


def write_store(settings: SampleSettings, folder: Path, *, key: str, processes: int = 1) -> None:
    """Read and encode the conversations and write ``folder``, in place of a store that is there.

    The files are written beside it, flushed, and take its name when all are complete.

    Args:
        key: of the settings.
        processes: how many encode; the bytes do not depend on it.

    Raises:
        DataError: see ``samples_in``.
        ConfigError: the folder is not ours.
    """
    refuse_foreign_store(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_siblings(folder)
    temporary = temporary_sibling(folder)
    temporary.mkdir()
    try:
        manifest = _write(settings, temporary, key, processes)
        write_atomically(temporary / MANIFEST, orjson.dumps(manifest))
        refuse_foreign_store(folder)  # once more: encoding took a while
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(settings: SampleSettings, folder: Path, key: str, processes: int) -> StoreManifest:
    encoder, tally = RowEncoder(settings), settings.tally()
    domains: dict[str, int] = {}
    hasher = BlockHasher()
    begin = where_end = count = 0
    with ExitStack() as stack:
        names = (_TOKENS, _SAMPLES, _REFLECTION, _WHERE)
        tokens, samples, reflection, where = (stack.enter_context((folder / n).open("wb")) for n in names)
        stack.callback(encoder.close)
        for piece in encode_in_order(settings, encoder, tally, processes=processes):
            own = np.frombuffer(piece.samples, SAMPLE).copy()
            own["begin"] += begin
            own["where_end"] += where_end
            numbers = [domains.setdefault(name, len(domains)) for name in piece.domains]
            own["domain"] = np.array(numbers, dtype=np.int32)[own["domain"]]
            tokens.write(piece.tokens)
            hasher.update(piece.tokens)
            samples.write(own.tobytes())
            reflection.write(piece.reflection)
            where.write(piece.where)
            begin, where_end, count = begin + len(piece.tokens) // 4, where_end + len(piece.where), count + len(own)
        refuse_files_of_bad_rows(tally.files)
        for file in (tokens, samples, reflection, where):
            file.flush()
            os.fsync(file.fileno())
    write_atomically(folder / _BLOCKS, hasher.finish())
    return StoreManifest(
        written_by=_written_by(),
        key=key,
        pad_id=encoder.pad_id,
        domains=tuple(domains),
        patterns=settings.patterns,
        hashes={name: _sha256(folder / name) for name in (_BLOCKS, _SAMPLES, _REFLECTION, _WHERE)},
        samples=count,
        files=tuple(ReadFile(f.file, f.dialect, f.rows) for f in tally.files),
        bad_rows=dict(sum((f.bad for f in tally.files), tally.refused).most_common()),
        unused_keys=dict(tally.unused_keys.most_common()),
        counts=dict(tally.counts),
    )


def _written_by() -> str:
    return f"m1 sft {FORMAT}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
