"""``manifest.json``: what a prepared data folder holds and where it came from. The file holds its own hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.spec import BUCKET_NAMES
from m1_data.storage.blocks import RESTORE
from m1_data.storage.ownership import why_not_a_name
from m1_data.storage.plain_values import from_plain, shown

MANIFEST = "manifest.json"
SCHEMA = 2
WITHOUT_HASHES = 1
"""The schema of versions whose manifests had no hash of their own, and whose shards had no block hashes."""


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
    blocks_sha256: str = ""
    """Of the file with the block hashes; empty in data of older versions."""


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
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file in the folder ``tokenizer``; empty in data of older versions."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the data was made from, by key: ``prepare.inputs``; empty in data of older versions."""
    schema: int = SCHEMA

    @property
    def content_hash(self) -> str:
        """A SHA-256 that changes whenever a training token or the tokenizer changes."""
        parts = [self.tokenizer_sha256, *(f"{s.prefix}:{s.bin_sha256}" for s in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def has_hashes(self) -> bool:
        """Whether the manifest has a hash of its own and the shards have block hashes."""
        return self.schema != WITHOUT_HASHES

    def to_json(self) -> str:
        """Return the text of ``manifest.json``, which ends with the hash of all before."""
        values = dataclasses.asdict(self)
        return _text(values) if self.has_hashes else _json(values)


def load_manifest(data_dir: Path) -> Manifest:
    """Read and return the manifest of ``data_dir``; every byte of it counts.

    Raises:
        DataError: no prepared data there, a manifest of another version, or a damaged one.
    """
    path = data_dir / MANIFEST
    if not path.exists():
        raise DataError(f"there is no prepared data in {data_dir}", where=str(path), fix="run: m1 prepare-data")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if "sha256" in values:
            body = {key: value for key, value in values.items() if key != "sha256"}
            if text != _text(body):
                raise ValueError("its own hash does not fit: a byte of it was changed")
            values = body
        elif values.get("schema") != WITHOUT_HASHES:
            raise ValueError("its own hash is missing")
        if values.get("schema") not in (WITHOUT_HASHES, SCHEMA):
            raise DataError(
                f"the manifest has schema {shown(values.get('schema'))}, this version reads {WITHOUT_HASHES} and {SCHEMA}",
                where=str(path),
                fix="run m1 prepare-data again",
            )
        manifest: Manifest = from_plain(Manifest, values)
        _check(manifest)
        return manifest
    except OSError as error:
        raise DataError(f"cannot read the manifest: {error}", where=str(path), fix=RESTORE) from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"the manifest is damaged: {why}", where=str(path), fix=RESTORE) from error


def _check(manifest: Manifest) -> None:
    """Check what the values say of each other; that is all there is to check a manifest without a hash by."""
    if not 0 <= manifest.eod_id < manifest.vocab_size < 2**31:
        raise ValueError(f"eod_id {manifest.eod_id} and vocab_size {manifest.vocab_size} do not fit")
    if not manifest.length_scale > 0 or list(manifest.bucket_edges_tokens) != sorted(manifest.bucket_edges_tokens):
        raise ValueError("length_scale or bucket_edges_tokens are out of order")
    sources = {source.name: source.domain for source in manifest.sources}
    buckets, domains = dict.fromkeys(BUCKET_NAMES, 0), dict[str, int]()
    for shard in (*manifest.shards, *manifest.held_out):
        parts = shard.prefix.split("/")
        if any(map(why_not_a_name, (*parts, shard.source))) or shard.bucket not in BUCKET_NAMES:
            raise ValueError(f"{shown(shard.prefix)} is not the name of a shard in this folder")
        if sources and sources.get(shard.source) != shard.domain:
            raise ValueError(f"the source of {shown(shard.prefix)} is not among the sources")
        hashes = (shard.bin_sha256, shard.idx_sha256, *([shard.blocks_sha256] if manifest.has_hashes else []))
        if not all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes):
            raise ValueError(f"the hashes of {shown(shard.prefix)} are not SHA-256")
    for shard in manifest.shards:
        buckets[shard.bucket] += shard.tokens
        domains[shard.domain] = domains.get(shard.domain, 0) + shard.tokens
    if manifest.tokens_by_bucket not in ({}, buckets) or manifest.tokens_by_domain not in ({}, domains):
        raise ValueError("its token counts do not add up")
    if any(map(why_not_a_name, manifest.tokenizer_files)):
        raise ValueError("tokenizer_files has what is not the name of a file")


def _text(body: dict[str, Any]) -> str:
    return _json({**body, "sha256": hashlib.sha256(_json(body).encode()).hexdigest()})


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
