"""The folder a preparation works in until it is complete, what it keeps there to continue."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m1_data.errors import ConfigError, DataError, shown
from m1_data.prepare.account import SourceRecord
from m1_data.prepare.deduplicate import ExactDedup
from m1_data.spec import SourceSpec
from m1_data.storage.durable import flush, write_atomically
from m1_data.storage.manifest import MANIFEST, Manifest, is_prepared
from m1_data.storage.ownership import refuse_to_replace
from m1_data.storage.source_files import find_files
from m1_data.storage.store import open_shard

FORMAT_VERSION = 3
"""Raised whenever the same inputs would give other bytes, so that existing data is prepared again."""


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """SHA-256 of what determines the output: settings, and paths, sizes and times of the files.

    Encoded text is used again as long as the fingerprint of its source stays, whatever else changes.
    """

    whole: str
    """Of everything, the stages' mixes too."""
    common: str
    """Of what all sources depend on: tokenizer, engine and how documents are chosen."""
    sources: dict[str, str]
    """Of each source with all that come before it, by name: a text stays with the first source that has it."""


def in_order(sources: Sequence[SourceSpec]) -> list[SourceSpec]:
    """Return the sources as they are prepared: needles come last, their documents are hidden in the text of the others."""
    return sorted(sources, key=lambda source: source.format == "needles")


_MARKER = "fingerprint"
_TRAINED = "trained.json"
_OURS = (
    "manifest.json",
    "shards",
    "held_out",
    "tokenizer",
    "fingerprint",
    "trained.json",
    "trained.json.sha256",
    "*.done",
    "*.hashes",
    "*.tmp",
)
"""Entries of a prepared folder and of one in work."""


def refuse_foreign_folders(out: Path, sources: Sequence[SourceSpec], base_dir: Path) -> None:
    """Refuse to prepare into folders that hold what is not ours, before anything is written.

    ``out`` is renamed to ``<out>.previous`` when new data is complete, and ``<out>.previous`` and ``<out>.partial`` are removed,
    so all three must be missing, empty, or written by an earlier preparation; and no source may be read from inside them.

    Raises:
        ConfigError: one of them holds what m1 did not write, or a source's files.
    """
    fix = 'give data.out a folder of its own, for example data.out = "prepared"'
    read_from = {
        source.name: {place.resolve() for f in find_files(source, base_dir).files for place in (f.root, f.path.parent)}
        for source in sources
    }
    folders = [out, out.with_name(f"{out.name}.previous"), out.with_name(f"{out.name}.partial")]
    for folder in folders:
        for source in sources:
            for path in read_from[source.name]:
                if folder in (path, *path.parents):
                    raise ConfigError(
                        f"source {source.name!r} is read from inside the folder that m1 prepare-data replaces",
                        where=f"{shown(path)}, key data.out",
                        fix=fix,
                    )
        refuse_to_replace(folder, what=f"{folder.name} (key data.out)", marked=is_prepared(folder), ours=_OURS, fix=fix)


class WorkFolder:
    """``<out>.partial``. A source is finished there when ``<source>.done`` exists; the file is written last.

    What an earlier run finished there, or published in ``out``, is used again for every source whose fingerprint stays. A
    folder of other common inputs is emptied.
    """

    def __init__(self, out: Path, fingerprints: Fingerprints) -> None:
        self._out, self._fingerprints = out, fingerprints
        self.path = out.with_name(f"{out.name}.partial")
        if not self._has_same_inputs(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            (self.path / _MARKER).write_text(fingerprints.common)
            if self._has_same_inputs(out):
                for name in (_TRAINED, f"{_TRAINED}.sha256"):
                    if (out / name).is_file():
                        shutil.copyfile(out / name, self.path / name)

    @property
    def trained_tokenizer(self) -> Path:
        """The file of a tokenizer trained by this preparation."""
        return self.path / _TRAINED

    def load_finished(self, source: SourceSpec, seen: ExactDedup) -> SourceRecord | None:
        """Return the record of a source that an earlier run finished, or None; ``seen`` gets the texts it had.

        It is None, too, when a byte of what was finished is not what was written.
        """
        for folder in (self.path, self._out):
            if (found := self._finished_in(folder, source)) is not None:
                record, digests = found
                if folder != self.path:
                    self._take_over(record, digests)
                seen.restore(digests)
                return record
        (self.path / f"{source.name}.done").unlink(missing_ok=True)
        return None

    def save_finished(self, record: SourceRecord, digests: bytes) -> None:
        """Mark a source as finished. ``digests`` are those of the texts that it was the first to have.

        Raises:
            OSError: the disk is full or failing.
        """
        name = record.source.name
        write_atomically(self.path / f"{name}.hashes", digests)
        done = {"fingerprint": self._fingerprints.sources[name], "record": record.to_json()}
        write_atomically(self.path / f"{name}.done", json.dumps(done | {"sha256": _sha256(done, digests)}))

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and rename the folder to ``<out>``; an older one is kept beside it as ``<out>.previous``.

        Raises:
            OSError: the disk is full or failing.
        """
        self._remove_other_sources({source.name for source in manifest.sources})
        write_atomically(self.path / MANIFEST, manifest.to_json())
        if self._out.exists():
            previous = self._out.with_name(f"{self._out.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            self._out.rename(previous)
        self.path.rename(self._out)
        flush(self._out.parent)

    def _has_same_inputs(self, folder: Path) -> bool:
        try:
            return (folder / _MARKER).read_text(encoding="utf-8") == self._fingerprints.common
        except (OSError, ValueError):
            return False

    def _finished_in(self, folder: Path, source: SourceSpec) -> tuple[SourceRecord, bytes] | None:
        """The record of a finished source and the hashes of its texts, after every byte of its files was compared."""
        try:
            done = json.loads((folder / f"{source.name}.done").read_text(encoding="utf-8"))
            digests = (folder / f"{source.name}.hashes").read_bytes()
            expected = done.pop("sha256")
            if expected != _sha256(done, digests) or done["fingerprint"] != self._fingerprints.sources[source.name]:
                return None
            record = SourceRecord.from_json(done["record"])
            for shard in (*record.shards, *record.held_out):
                open_shard(folder, shard, whole=True)
            return record, digests
        except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # not finished, damaged, or written by another version

    def _take_over(self, record: SourceRecord, digests: bytes) -> None:
        """Link the shards of a published source into this folder."""
        for kind in ("shards", "held_out"):
            shutil.rmtree(self.path / kind / record.source.name, ignore_errors=True)
        for shard in (*record.shards, *record.held_out):
            for path in (f"{shard.prefix}{suffix}" for suffix in (".bin", ".idx", ".blocks")):
                (self.path / path).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(self._out / path, self.path / path)
        self.save_finished(record, digests)

    def _remove_other_sources(self, names: set[str]) -> None:
        """Remove what sources left here that the configuration no longer has."""
        for pattern in ("shards/*", "held_out/*", "*.done", "*.hashes"):
            for path in self.path.glob(pattern):
                if path.is_dir() and path.name not in names:
                    shutil.rmtree(path)
                elif path.is_file() and path.stem not in names:
                    path.unlink()


def _sha256(done: dict[str, str], digests: bytes) -> str:
    return hashlib.sha256(json.dumps(done, sort_keys=True).encode() + digests).hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return
    shutil.copyfile(source, target)
