"""Step 7, account: every record of a source ends in its entry of the manifest, and the manifest sums up all sources."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m1_data.errors import DataError, shown
from m1_data.prepare.shards import WrittenDocuments
from m1_data.prepare.tally import Tally
from m1_data.sampling.mix import TooLittleData
from m1_data.sampling.stage_draw import Lengths, StageDraw, count_mix, draws_of
from m1_data.spec import BUCKET_NAMES, CORE_DOMAINS, SourceSpec, StageMix
from m1_data.storage.cell import Cell
from m1_data.storage.indexed import IndexedReader
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
    source: SourceSpec, tally: Tally, written: WrittenDocuments, *, max_bad_share: float
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
        files=tally.files,
        records=tally.records,
        documents=shards.documents.total(),
        utf8_bytes=written.utf8_bytes,
        tokens=shards.tokens,
        longest_tokens=max(shards.longest, held_out.longest),
        rejected=dict(sorted(tally.rejected.items())),
        noted=dict(sorted(tally.noted.items())),
        verified_ids=written.verified_ids,
        held_out=held_out.documents.total(),
        first_places=dict(sorted(tally.first_places.items())),
        left_out=tally.left_out,
        held_out_digests=written.held_out_digests,
    )
    return SourceRecord(source=entry, shards=shards.close(), held_out=held_out.close())


def _refuse_useless_source(source: SourceSpec, tally: Tally, documents: int, max_bad_share: float) -> None:
    reasons = "; ".join(
        f"{count} {reason}" + (f", first at {place}" if (place := tally.first_places.get(reason)) else "")
        for reason, count in tally.rejected.most_common()
    )
    if tally.records and (share := tally.bad / tally.records) > max_bad_share:
        fix = _advice(tally.rejected.most_common(1)[0][0])
        if share < 1:
            allowed = math.ceil(share * 1000) / 1000
            fix += f"; or, if these records may be lost: --set data.max_bad_share={allowed} (now {max_bad_share})"
        raise DataError(
            f"{tally.bad} of {tally.records} records of source {source.name!r} are unusable: {reasons}",
            where=f"source {source.name}, {shown(source.path)}",
            fix=fix,
        )
    if not documents and not tally.rejected["duplicate"]:
        raise DataError(
            f"source {source.name!r} gave no document" + (f": {reasons}" if reasons else ""),
            where=f"source {source.name}, {shown(source.path)}",
            fix="check the path, the include patterns and text_field, or take the source out",
        )


def _advice(reason: str) -> str:
    if reason == "invalid UTF-8":
        return "convert the files, for example from the usual encoding of Windows: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    if reason == "malformed JSON":
        return "mend the files: JSON Lines has one whole JSON object a line"
    if reason.startswith(("no field", "text is", "null text")):
        return "set text_field on this source to the field that holds the text"
    return "correct the files, or the path and format of the source"


def build_manifest(
    records: Sequence[SourceRecord],
    mixes: Sequence[tuple[StageMix, int]],
    *,
    inputs: dict[str, Any],
    folder: Path,
    seed: int,
    fingerprint: str,
    engine: str,
    tokenizer: LoadedTokenizer,
    tokenizer_files: dict[str, str],
    length_scale: float,
    edges: tuple[int, ...],
) -> Manifest:
    """Return the manifest of all sources, in the order of ``records``.

    Args:
        mixes: each stage's mix and the tokens it draws, in the order of the stages.
        inputs: what the data was made from (``prepare.inputs``), and ``fingerprint``, their hash.
        folder: where the shards are.
        seed: the run's, which orders the rows that are counted.
        tokenizer_files: SHA-256 of each file of the tokenizer's folder.
        edges: exclusive upper edges of the length buckets, in tokens.
    """
    shards = tuple(shard for record in records for shard in record.shards)
    lengths = {
        Cell(s.source, s.domain, s.bucket): IndexedReader(folder / s.prefix).lengths.astype(np.int64) for s in shards
    }
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
        mixes={draw.mix.stage: _mix_report(draw, lengths) for draw in draws_of(mixes, seed=seed)},
        held_out=tuple(shard for record in records for shard in record.held_out),
    )


def _mix_report(draw: StageDraw, lengths: Lengths) -> dict[str, Any]:
    """Return what the stage draws from this data. A stage that cannot run is only reported here, not refused."""
    try:
        return {"possible": True, "order": draw.order, **count_mix(draw, lengths).as_dict()}
    except TooLittleData as error:
        return {"possible": False, "stage": draw.mix.stage, "reasons": [error.what]}
