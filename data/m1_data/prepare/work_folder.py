"""The folder a preparation works in until it is complete, what it keeps there to continue."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from m1_data.errors import ConfigError, DataError
from m1_data.prepare.account import SourceRecord
from m1_data.prepare.deduplicate import ExactDedup
from m1_data.prepare.reader import source_files
from m1_data.spec import SourceSpec
from m1_data.storage.durable import flush, write_atomically
from m1_data.storage.manifest import MANIFEST, Manifest
from m1_data.storage.ownership import refuse_to_replace
from m1_data.storage.store import open_shard

FORMAT_VERSION = 2
"""Raised whenever the same inputs would give other bytes, so that existing data is prepared again."""


_OURS = (
    "manifest.json",
    "shards",
    "held_out",
    "tokenizer",
    "fingerprint",
    "trained.json",
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
    folders = [out, out.with_name(f"{out.name}.previous"), out.with_name(f"{out.name}.partial")]
    for folder in folders:
        for source in sources:
            for path in source_files(source, base_dir):
                if folder in (path.resolve(), *path.resolve().parents):
                    raise ConfigError(
                        f"source {source.name!r} is read from inside the folder that m1 prepare-data replaces",
                        where=f"{path}, key data.out",
                        fix=fix,
                    )
        marked = (folder / "fingerprint").is_file() if folder.suffix == ".partial" else is_prepared(folder)
        refuse_to_replace(folder, what=f"{folder.name} (key data.out)", marked=marked, ours=_OURS, fix=fix)


def is_prepared(folder: Path) -> bool:
    """Return whether ``folder`` has a manifest of ours, whole or damaged: then its reader says what is wrong."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(f'"{key}"' in text for key in ("bucket_edges_tokens", "tokens_by_bucket", "documents_by_bucket"))


class WorkFolder:
    """``<out>.partial``. A source is finished there when ``<source>.done`` exists; the file is written last.

    An earlier run's folder is continued when it has the same ``fingerprint``, and otherwise emptied.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self._out = out
        self.path = out.with_name(f"{out.name}.partial")
        marker = self.path / "fingerprint"
        if not marker.is_file() or marker.read_text() != fingerprint:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            marker.write_text(fingerprint)

    @property
    def trained_tokenizer(self) -> Path:
        """The file of a tokenizer trained by this preparation."""
        return self.path / "trained.json"

    def load_finished(self, source: SourceSpec, seen: ExactDedup) -> SourceRecord | None:
        """Return the record of a source that an earlier run finished, or None; ``seen`` gets the texts it had.

        It is None, too, when a file of it is not what was written.
        """
        path = self.path / f"{source.name}.done"
        if not path.is_file():
            return None
        try:
            record = SourceRecord.from_json(path.read_text(encoding="utf-8"))
            for shard in (*record.shards, *record.held_out):
                open_shard(self.path, shard, whole=True)
            digests = (self.path / f"{source.name}.hashes").read_bytes()
        except (DataError, ValueError, TypeError, KeyError, OSError):  # damaged: the source is read again
            return None
        seen.restore(digests)
        return record

    def save_finished(self, record: SourceRecord, digests: bytes) -> None:
        """Mark a source as finished. ``digests`` are those of the texts that it was the first to have.

        Raises:
            OSError: the disk is full or failing.
        """
        write_atomically(self.path / f"{record.source.name}.hashes", digests)
        write_atomically(self.path / f"{record.source.name}.done", record.to_json())

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and rename the folder to ``<out>``; an older one is kept beside it as ``<out>.previous``.

        Raises:
            OSError: the disk is full or failing.
        """
        write_atomically(self.path / MANIFEST, manifest.to_json())
        kept_to_continue = (*self.path.glob("*.done"), *self.path.glob("*.hashes"))
        for path in (*kept_to_continue, self.trained_tokenizer, self.path / "fingerprint"):
            path.unlink(missing_ok=True)
        if self._out.exists():
            previous = self._out.with_name(f"{self._out.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            self._out.rename(previous)
        self.path.rename(self._out)
        flush(self._out.parent)
