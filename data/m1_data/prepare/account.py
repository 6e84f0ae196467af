"""Step 7, account: every record of a source ends in its entry of the manifest, and the manifest sums up all sources."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.prepare.reader import source_files
from m1_data.prepare.shards import WrittenDocuments
from m1_data.prepare.tally import Tally
from m1_data.sampling.mix import plan_mix
from m1_data.spec import BUCKET_NAMES, CORE_DOMAINS, SourceSpec, StageMix
from m1_data.storage.cell import Cell
from m1_data.storage.manifest import Manifest, ShardEntry, SourceEntry
from m1_data.tokenizer import LoadedTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """The part of the manifest that one finished source gives."""

    source: SourceEntry
    shards: tuple[ShardEntry, ...]
    held_out: tuple[ShardEntry, ...] = ()

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SourceRecord:
        """Return the record that ``to_json`` wrote."""
        values = json.loads(text)
        return cls(
            source=SourceEntry(**{**values["source"], "files": tuple(values["source"]["files"])}),
            shards=tuple(ShardEntry(**entry) for entry in values["shards"]),
            held_out=tuple(ShardEntry(**entry) for entry in values["held_out"]),
        )


def account_for_source(
    source: SourceSpec, tally: Tally, written: WrittenDocuments, *, base_dir: Path, max_bad_share: float
) -> SourceRecord:
    """Complete the shards of a source and return its record.

    Raises:
        DataError: more than ``max_bad_share`` of the records are unusable, or none gave a document. The shards stay
            incomplete.
    """
    _refuse_useless_source(source, tally, written.documents, max_bad_share)
    shards, held_out = written.shards, written.held_out
    entry = SourceEntry(
        name=source.name,
        domain=source.domain,
        files=tuple(path.name for path in source_files(source, base_dir)),
        records=tally.records,
        documents=shards.documents.total(),
        utf8_bytes=written.utf8_bytes,
        tokens=shards.tokens,
        longest_tokens=max(shards.longest, held_out.longest),
        rejected=dict(sorted(tally.rejected.items())),
        noted=dict(sorted(tally.noted.items())),
        verified_ids=written.verified_ids,
        held_out=held_out.documents.total(),
    )
    return SourceRecord(source=entry, shards=shards.close(), held_out=held_out.close())


def _refuse_useless_source(source: SourceSpec, tally: Tally, documents: int, max_bad_share: float) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.rejected.most_common())
    if tally.records and tally.bad / tally.records > max_bad_share:
        raise DataError(
            f"{tally.bad} of {tally.records} records of source {source.name!r} are unusable: {reasons}",
            where=f"source {source.name}, {source.path}",
            fix="correct text_field or the file, or raise data.max_bad_share if this is expected",
        )
    if not documents and not tally.rejected["duplicate"]:
        raise DataError(
            f"source {source.name!r} gave no document" + (f": {reasons}" if reasons else ""),
            where=f"source {source.name}, {source.path}",
            fix="check the path, the include patterns and text_field, or take the source out",
        )


def build_manifest(
    records: Sequence[SourceRecord],
    mixes: Sequence[tuple[StageMix, int]],
    *,
    inputs: dict[str, Any],
    fingerprint: str,
    engine: str,
    tokenizer: LoadedTokenizer,
    tokenizer_files: dict[str, str],
    length_scale: float,
    edges: tuple[int, ...],
) -> Manifest:
    """Return the manifest of all sources, in the order of ``records``.

    Args:
        mixes: each stage's mix and the tokens it draws.
        inputs: what the data was made from (``prepare.inputs``), and ``fingerprint``, their hash.
        tokenizer_files: SHA-256 of each file of the tokenizer's folder.
        edges: exclusive upper edges of the length buckets, in tokens.
    """
    shards = tuple(shard for record in records for shard in record.shards)
    domains: dict[str, int] = {}
    buckets, counts = dict.fromkeys(BUCKET_NAMES, 0), dict.fromkeys(BUCKET_NAMES, 0)
    for shard in shards:
        domains[shard.domain] = domains.get(shard.domain, 0) + shard.tokens
        buckets[shard.bucket] += shard.tokens
        counts[shard.bucket] += shard.documents
    total = max(1, sum(domains.values()))
    return Manifest(
        inputs=inputs,
        fingerprint=fingerprint,
        engine=engine,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        eod_token=tokenizer.eod_token,
        tokenizer_sha256=hashlib.sha256(tokenizer.json_bytes).hexdigest(),
        tokenizer_files=tokenizer_files,
        length_scale=length_scale,
        bucket_edges_tokens=edges,
        sources=tuple(record.source for record in records),
        shards=shards,
        tokens_by_domain=dict(sorted(domains.items())),
        tokens_by_bucket=buckets,
        documents_by_bucket=counts,
        core_share=sum(n for domain, n in domains.items() if domain in CORE_DOMAINS) / total,
        mixes={mix.stage: _mix_report(shards, mix, tokens, edges) for mix, tokens in mixes},
        held_out=tuple(shard for record in records for shard in record.held_out),
    )


def _mix_report(
    shards: Sequence[ShardEntry], mix: StageMix, stage_tokens: int, edges: tuple[int, ...]
) -> dict[str, Any]:
    """Return what the stage would draw from this data. A stage that cannot run is only reported here, not refused."""
    cells = {Cell(s.source, s.domain, s.bucket): s.tokens for s in shards}
    ends = dict(zip(BUCKET_NAMES, (*edges, sys.maxsize), strict=True))
    longest = {cell: ends[cell.bucket] for cell in cells}
    try:
        return {"possible": True, **plan_mix(cells, mix, stage_tokens=stage_tokens, longest=longest).as_dict()}
    except DataError as error:
        return {"possible": False, "stage": mix.stage, "reasons": [str(error)]}
