"""The folder a preparation works in until it is complete, what it keeps there to continue, and what it was made from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.errors import ConfigError, shown
from m1_data.prepare.account import SourceRecord
from m1_data.prepare.deduplicate import ExactDedup
from m1_data.spec import PrepareSpec, SourceSpec, StageMix, TokenizerSpec
from m1_data.storage.durable import flush, write_atomically
from m1_data.storage.manifest import MANIFEST, Manifest, ShardEntry, is_prepared, load_manifest
from m1_data.storage.ownership import refuse_to_replace
from m1_data.storage.source_files import find_files

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


def fingerprint_inputs(
    spec: PrepareSpec,
    tokenizer: TokenizerSpec,
    mixes: Sequence[tuple[StageMix, int]],
    base_dir: Path,
    length_scale: float,
    seed: int = 0,
) -> Fingerprints:
    """Return the fingerprints of a preparation.

    Raises:
        DataError: a source has no files.
    """
    inputs = {
        source.name: (dataclasses.asdict(source), _identities(f.path for f in find_files(source, base_dir).files))
        for source in in_order(spec.sources)
    }
    trained_on: Any = inputs
    if tokenizer.path:
        path = (base_dir / Path(tokenizer.path).expanduser()).resolve()
        trained_on = _identities(p for p in (path, path / "tokenizer.json") if p.is_file())
    settings = dataclasses.asdict(dataclasses.replace(spec, sources=()))
    common = _sha256(FORMAT_VERSION, settings, dataclasses.asdict(tokenizer), trained_on, length_scale)
    contexts = [mix.seq_len_tokens for mix, _ in mixes]
    sources: dict[str, str] = {}
    chain = common
    for source in in_order(spec.sources):
        generated_for = contexts if source.format == "needles" else ()
        sources[source.name] = chain = _sha256(chain, inputs[source.name], generated_for)
    whole = _sha256(chain, [(dataclasses.asdict(mix), tokens) for mix, tokens in mixes], seed)
    return Fingerprints(whole, common, sources)


def in_order(sources: Sequence[SourceSpec]) -> list[SourceSpec]:
    """Return the sources as they are prepared: needles come last, their documents are hidden in the text of the others."""
    return sorted(sources, key=lambda source: source.format == "needles")


def _identities(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]


def _sha256(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def find_up_to_date(out: Path, fingerprint: str) -> Manifest | None:
    """Return the manifest of the data in ``out`` if it was made from the same inputs, else None.

    Raises:
        DataError: the manifest there is damaged or of another version.
    """
    if not is_prepared(out):
        return None
    manifest = load_manifest(out)
    return manifest if manifest.fingerprint == fingerprint else None


_MARKER = "fingerprint"
_TRAINED = "trained.json"
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
            if self._has_same_inputs(out) and (out / _TRAINED).is_file():
                shutil.copyfile(out / _TRAINED, self.trained_tokenizer)

    @property
    def trained_tokenizer(self) -> Path:
        """The file of a tokenizer trained by this preparation."""
        return self.path / _TRAINED

    def load_finished(self, source: SourceSpec, seen: ExactDedup) -> SourceRecord | None:
        """Return the record of a source that an earlier run finished, or None; ``seen`` gets the texts it had."""
        for folder in (self.path, self._out):
            record = self._finished_in(folder, source)
            if record is not None and (folder == self.path or self._take_over(record)):
                seen.restore((self.path / f"{source.name}.hashes").read_bytes())
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
        write_atomically(self.path / f"{name}.done", json.dumps(done))

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and rename the folder to ``<out>``; an older one is kept beside it as ``<out>.previous``.

        Raises:
            OSError: the disk is full or failing.
        """
        self._remove_other_sources({source.name for source in manifest.sources})
        (self.path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
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

    def _finished_in(self, folder: Path, source: SourceSpec) -> SourceRecord | None:
        try:
            done = json.loads((folder / f"{source.name}.done").read_text(encoding="utf-8"))
            if done["fingerprint"] != self._fingerprints.sources[source.name]:
                return None
            return SourceRecord.from_json(done["record"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not finished, or written by another version

    def _take_over(self, record: SourceRecord) -> bool:
        """Link the shards of a published source into this folder; return False if they are not what was written."""
        name = record.source.name
        for shard in (*record.shards, *record.held_out):
            for path, sha256 in _files_of(shard):
                if not _has_sha256(self._out / path, sha256):
                    return False
        for kind in ("shards", "held_out"):
            shutil.rmtree(self.path / kind / name, ignore_errors=True)
        for shard in (*record.shards, *record.held_out):
            for path, _ in _files_of(shard):
                (self.path / path).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(self._out / path, self.path / path)
        try:
            self.save_finished(record, (self._out / f"{name}.hashes").read_bytes())
        except FileNotFoundError:
            return False
        return True

    def _remove_other_sources(self, names: set[str]) -> None:
        """Remove what sources left here that the configuration no longer has."""
        for pattern in ("shards/*", "held_out/*", "*.done", "*.hashes"):
            for path in self.path.glob(pattern):
                if path.is_dir() and path.name not in names:
                    shutil.rmtree(path)
                elif path.is_file() and path.stem not in names:
                    path.unlink()


def _files_of(shard: ShardEntry) -> tuple[tuple[str, str], ...]:
    return (f"{shard.prefix}.bin", shard.bin_sha256), (f"{shard.prefix}.idx", shard.idx_sha256)


def _has_sha256(path: Path, expected: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected
    except OSError:
        return False


def _link_or_copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return
    shutil.copyfile(source, target)
