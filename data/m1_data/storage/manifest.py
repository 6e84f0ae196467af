"""``manifest.json``: what a prepared data folder holds and where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.storage.text_digest import DIGEST_BYTES

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One IndexedDataset with the documents of one source and length bucket."""

    source: str
    domain: str
    bucket: str
    prefix: str
    """Path relative to the data folder, without ``.bin`` or ``.idx``."""
    documents: int
    tokens: int
    """Number of tokens; end-of-document tokens are counted."""
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceEntry:
    """The account of one source's records."""

    name: str
    domain: str
    files: tuple[str, ...]
    records: int
    documents: int
    """Number of documents for training."""
    utf8_bytes: int
    """UTF-8 bytes of the kept documents after cleaning, held-out ones among them."""
    tokens: int
    """Number of tokens for training; end-of-document tokens are not counted."""
    longest_tokens: int
    rejected: dict[str, int]
    """Number of records that gave no document, by reason; ``duplicate`` is among them."""
    noted: dict[str, int]
    verified_ids: int
    """Number of ids that were compared with the tokenizers library."""
    held_out: int = 0
    """Number of documents kept out of training."""
    first_places: dict[str, str] = field(default_factory=dict)
    """File and line of the first unusable record, for each reason in ``rejected`` that makes a record unusable."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of files and folders that the source's folders hold and that are not read, by kind."""
    held_out_digests: str = ""
    """``text_digest`` of each of them, as hexadecimal digits, one after the other: fine-tuning leaves them out, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents and origin of a prepared data folder."""

    fingerprint: str
    """SHA-256 of everything that determines the output: specification and input files."""
    engine: str
    vocab_size: int
    eod_id: int
    eod_token: str
    tokenizer_sha256: str
    length_scale: float
    bucket_edges_tokens: tuple[int, ...]
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]
    tokens_by_domain: dict[str, int]
    tokens_by_bucket: dict[str, int]
    documents_by_bucket: dict[str, int]
    core_share: float
    """Share of STEM, code, book and reasoning in all tokens at hand."""
    mixes: dict[str, Any]
    """By stage name: wanted and reached shares, and why a target is missed."""
    held_out: tuple[ShardEntry, ...] = ()
    """Documents that are never trained on; none in data of older versions."""
    schema: int = SCHEMA

    @property
    def content_hash(self) -> str:
        """A SHA-256 that changes whenever a training token or the tokenizer changes."""
        parts = [self.tokenizer_sha256, *(f"{s.prefix}:{s.bin_sha256}" for s in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def held_out_digests(self) -> frozenset[bytes]:
        """The ``text_digest`` of every held-out text."""
        size = 2 * DIGEST_BYTES
        return frozenset(
            bytes.fromhex(source.held_out_digests[i : i + size])
            for source in self.sources
            for i in range(0, len(source.held_out_digests), size)
        )

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def is_prepared(folder: Path) -> bool:
    """Return whether a preparation wrote ``folder``: it has a manifest of ours, whole or damaged, or is one in work."""
    if folder.suffix == ".partial" and (folder / "fingerprint").is_file():
        return True
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return False
    return '"bucket_edges_tokens"' in text and '"fingerprint"' in text


def load_manifest(data_dir: Path, *, verify_hashes: bool = False) -> Manifest:
    """Read and return the manifest of ``data_dir``.

    Raises:
        DataError: no prepared data there, a manifest of another version, or (with ``verify_hashes``) a changed shard.
    """
    path = data_dir / MANIFEST
    if not path.is_file():
        raise DataError(f"there is no prepared data in {data_dir}", where=str(path), fix="run: m1 prepare-data")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema") != SCHEMA:
            raise DataError(
                f"the manifest has schema {values.get('schema')}, this version reads {SCHEMA}",
                where=str(path),
                fix="run m1 prepare-data again",
            )
        values["sources"] = tuple(SourceEntry(**{**s, "files": tuple(s["files"])}) for s in values["sources"])
        for key in ("shards", "held_out"):
            values[key] = tuple(ShardEntry(**s) for s in values.get(key, ()))
        values["bucket_edges_tokens"] = tuple(values["bucket_edges_tokens"])
        manifest = Manifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the manifest is damaged: {error}", where=str(path), fix="run m1 prepare-data again"
        ) from error
    if verify_hashes:
        for shard in (*manifest.shards, *manifest.held_out):
            for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
                _verify(data_dir / f"{shard.prefix}{suffix}", expected)
    return manifest


def _verify(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read a shard: {error}", where=str(path), fix="run m1 prepare-data again") from error
    if digest != expected:
        raise DataError("the shard is not the one that was written", where=str(path), fix="run m1 prepare-data again")
