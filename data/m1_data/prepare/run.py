"""Raw text in, Megatron-ready shards out: clean, deduplicate, tokenize, bucket by length, account for every record.

A few documents of each source and length bucket are held out: written to shards of their own, which training never opens.

Everything is written to ``<out>.partial`` and renamed at the end. A source that is complete there is not read again,
so an interrupted run continues; the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from m1_data.errors import DataError
from m1_data.prepare.clean import ExactDedup, clean
from m1_data.prepare.encode import Encoder
from m1_data.prepare.reader import Tally, read_source, source_files
from m1_data.prepare.shards import ShardWriters
from m1_data.sampling.mix import plan_mix
from m1_data.sampling.needles import SHORTEST_TOKENS, Haystack, training_documents
from m1_data.seeded_random import derive_seed
from m1_data.spec import (
    BUCKET_EDGES_TOKENS,
    BUCKET_NAMES,
    CORE_DOMAINS,
    PrepareSpec,
    SourceSpec,
    StageMix,
    TokenizerSpec,
)
from m1_data.storage.cell import Cell
from m1_data.storage.indexed import IndexedReader
from m1_data.storage.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, load_manifest
from m1_data.tokenizer import LoadedTokenizer, load_tokenizer, save_tokenizer, train_tokenizer

FORMAT_VERSION = 2
_BATCH_CHARS = 8_000_000
_BATCH_DOCS = 2_048

Progress = Callable[[str, str, int, int], None]
"""Called with (phase, source, documents, utf8 bytes) as work goes on; phase is reuse, train, encode, generate or done."""


def prepare(
    spec: PrepareSpec,
    tokenizer: TokenizerSpec,
    mixes: Sequence[tuple[StageMix, int]],
    *,
    base_dir: Path,
    length_scale: float,
    progress: Progress = lambda phase, source, documents, size: None,
) -> tuple[Manifest, bool]:
    """Prepare ``spec.sources`` into ``spec.out``.

    Args:
        mixes: every stage's mix and its tokens, for the report of what the data can and cannot give.
        base_dir: where relative paths start.
        length_scale: multiplies the bucket edges.

    Returns:
        The manifest, and whether anything had to be done: unchanged inputs over a finished folder are left alone.

    Raises:
        DataError: no sources, no usable documents, broken files, too many unusable records, a wrong tokenizer.
        EnvironmentProblem: an engine or library that is not installed.
    """
    if not spec.sources:
        raise DataError(
            "there are no data sources",
            where="key data.sources",
            fix="add a [[data.sources]] table to the configuration",
        )
    out = (base_dir / Path(spec.out).expanduser()).resolve()
    fingerprint = _fingerprint(spec, tokenizer, mixes, base_dir, length_scale)
    if (out / MANIFEST).is_file() and (done := load_manifest(out)).fingerprint == fingerprint:
        return done, False
    work = out.with_name(f"{out.name}.partial")
    marker = work / "fingerprint"
    if not marker.is_file() or marker.read_text() != fingerprint:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        marker.write_text(fingerprint)
    manifest = _Run(spec, tokenizer, base_dir, length_scale, work, progress).run(fingerprint, mixes)
    _publish(work, out)
    progress("done", "", sum(s.documents for s in manifest.sources), sum(s.utf8_bytes for s in manifest.sources))
    return manifest, True


class _Run:
    def __init__(
        self,
        spec: PrepareSpec,
        tokenizer: TokenizerSpec,
        base_dir: Path,
        length_scale: float,
        work: Path,
        progress: Progress,
    ) -> None:
        self.spec, self.tokenizer_spec, self.base_dir = spec, tokenizer, base_dir
        self.work, self.progress = work, progress
        self.length_scale = length_scale
        self.edges = tuple(round(edge * length_scale) for edge in BUCKET_EDGES_TOKENS)
        self.dedup = ExactDedup()
        self.holds_out = spec.dedup == "exact"  # a copy of a document held out could be trained on

    def run(self, fingerprint: str, mixes: Sequence[tuple[StageMix, int]]) -> Manifest:
        tokenizer = self._tokenizer()
        save_tokenizer(tokenizer, self.work / "tokenizer")
        encoder: Encoder | None = None
        sources: list[SourceEntry] = []
        shards: list[ShardEntry] = []
        held_out: list[ShardEntry] = []
        for source in sorted(self.spec.sources, key=lambda s: s.format == "needles"):  # hidden in what the others gave
            record = self._finished(source)
            if record is None and source.format == "needles":
                record = self._needles(source, tokenizer, shards, [mix.seq_len_tokens for mix, _ in mixes])
            elif record is None:
                encoder = encoder or Encoder(tokenizer, self.spec.engine)
                record = self._source(source, encoder, tokenizer)
            sources.append(SourceEntry(**{**record["source"], "files": tuple(record["source"]["files"])}))
            shards += [ShardEntry(**entry) for entry in record["shards"]]
            held_out += [ShardEntry(**entry) for entry in record["held_out"]]
        manifest = _manifest(
            fingerprint, self.spec.engine, tokenizer, self.length_scale, self.edges, sources, shards, mixes
        )
        manifest = dataclasses.replace(manifest, held_out=tuple(held_out))
        (self.work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _tokenizer(self) -> LoadedTokenizer:
        spec, trained = self.tokenizer_spec, self.work / "trained.json"
        if spec.path:
            return load_tokenizer((self.base_dir / Path(spec.path).expanduser()).resolve(), spec.eod_token)
        if not trained.exists():
            fresh = train_tokenizer(self._training_texts(), spec)
            _write_atomic(trained, fresh.json_bytes)
        return dataclasses.replace(load_tokenizer(trained, spec.eod_token), folder=None)

    def _training_texts(self) -> Iterator[str]:
        sources = [source for source in self.spec.sources if source.format != "needles"]
        for source in sources:
            budget = self.tokenizer_spec.train_bytes // len(sources)
            size = 0
            for count, raw in enumerate(read_source(source, self.base_dir, Tally()), 1):
                text = clean(raw, Tally())
                if text is None:
                    continue
                text = text[: budget - size]
                size += len(text)
                yield text
                self.progress("train", source.name, count, size)
                if size >= budget:
                    break

    def _finished(self, source: SourceSpec) -> dict[str, Any] | None:
        path = self.work / f"{source.name}.done"
        if not path.is_file():
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.dedup.restore((self.work / f"{source.name}.hashes").read_bytes())
        self.progress("reuse", source.name, record["source"]["documents"], record["source"]["utf8_bytes"])
        return record

    def _source(self, source: SourceSpec, encoder: Encoder, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        tally = Tally()
        shards, held_out = (self._shards(kind, source, tokenizer) for kind in ("shards", "held_out"))
        self.dedup.fresh.clear()
        documents = size = verified = 0
        for texts in self._batches(source, tally):
            if documents < self.spec.verify_docs:
                verified += encoder.verify(texts[: self.spec.verify_docs - documents])
            ids, offsets = encoder.encode(texts)
            for n, text in enumerate(texts):
                document = ids[offsets[n] : offsets[n + 1]]
                out = self.holds_out and held_out.want(text, len(document), shards, most=self.spec.held_out)
                (held_out if out else shards).add(document)
            documents += len(texts)
            size += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            self.progress("encode", source.name, documents, size)
        self._refuse_useless(source, tally, documents)
        entry = SourceEntry(
            name=source.name,
            domain=source.domain,
            files=tuple(path.name for path in source_files(source, self.base_dir)),
            records=tally.records,
            documents=shards.documents.total(),
            utf8_bytes=size,
            tokens=shards.tokens,
            longest_tokens=max(shards.longest, held_out.longest),
            rejected=dict(sorted(tally.rejected.items())),
            noted=dict(sorted(tally.noted.items())),
            verified_ids=verified,
            held_out=held_out.documents.total(),
        )
        return self._finish(source, entry, shards.close(), held_out.close(), b"".join(self.dedup.fresh))

    def _shards(self, kind: str, source: SourceSpec, tokenizer: LoadedTokenizer) -> ShardWriters:
        shutil.rmtree(self.work / kind / source.name, ignore_errors=True)
        return ShardWriters(self.work, kind, source, tokenizer, self.edges)

    def _needles(
        self, source: SourceSpec, tokenizer: LoadedTokenizer, text: list[ShardEntry], contexts: list[int]
    ) -> dict[str, Any]:
        """Generated documents for every context that has room for one, hidden in a sample of the text."""
        contexts = [tokens for tokens in contexts if tokens > SHORTEST_TOKENS]
        if not source.max_docs or not contexts:
            raise DataError(
                f"source {source.name!r} generates needles without end"
                if contexts
                else f"no stage's context has the {SHORTEST_TOKENS} tokens a needle document needs",
                where=f"[[data.sources]] {source.name}",
                fix="say how many documents: max_docs = 1000" if contexts else "raise curriculum.length_scale",
            )
        haystack = Haystack.of_text([IndexedReader(self.work / entry.prefix) for entry in text])
        shards = self._shards("shards", source, tokenizer)
        generated = training_documents(haystack, contexts, seed=derive_seed("needles", source.name))
        for number, ids in enumerate(islice(generated, source.max_docs), 1):
            shards.add(ids)
            self.progress("generate", source.name, number, 0)
        entry = SourceEntry(
            name=source.name, domain=source.domain, files=(), records=source.max_docs, documents=source.max_docs, utf8_bytes=0,
            tokens=shards.tokens, longest_tokens=shards.longest, rejected={}, noted={}, verified_ids=0,
        )  # fmt: skip
        return self._finish(source, entry, shards.close(), [], b"")

    def _finish(
        self, source: SourceSpec, entry: SourceEntry, shards: list[Any], held_out: list[Any], hashes: bytes
    ) -> dict[str, Any]:
        record = {"source": dataclasses.asdict(entry), "shards": shards, "held_out": held_out}
        _write_atomic(self.work / f"{source.name}.hashes", hashes)
        _write_atomic(self.work / f"{source.name}.done", json.dumps(record).encode())
        return record

    def _batches(self, source: SourceSpec, tally: Tally) -> Iterator[list[str]]:
        """Cleaned new documents, in batches of bounded size; one long document may be a batch of its own."""
        batch: list[str] = []
        chars = 0
        for raw in read_source(source, self.base_dir, tally):
            text = clean(raw, tally)
            if text is None:
                continue
            if self.spec.dedup == "exact" and not self.dedup.is_new(text):
                tally.rejected["duplicate"] += 1
                continue
            if batch and (chars + len(text) > _BATCH_CHARS or len(batch) == _BATCH_DOCS):
                yield batch
                batch, chars = [], 0
            batch.append(text)
            chars += len(text)
        if batch:
            yield batch

    def _refuse_useless(self, source: SourceSpec, tally: Tally, documents: int) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.rejected.most_common())
        if tally.records and tally.bad / tally.records > self.spec.max_bad_share:
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


def _manifest(
    fingerprint: str,
    engine: str,
    tokenizer: LoadedTokenizer,
    length_scale: float,
    edges: tuple[int, ...],
    sources: list[SourceEntry],
    shards: list[ShardEntry],
    mixes: Sequence[tuple[StageMix, int]],
) -> Manifest:
    domains: dict[str, int] = {}
    buckets, counts = dict.fromkeys(BUCKET_NAMES, 0), dict.fromkeys(BUCKET_NAMES, 0)
    for shard in shards:
        domains[shard.domain] = domains.get(shard.domain, 0) + shard.tokens
        buckets[shard.bucket] += shard.tokens
        counts[shard.bucket] += shard.documents
    total = max(1, sum(domains.values()))
    return Manifest(
        fingerprint=fingerprint,
        engine=engine,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        eod_token=tokenizer.eod_token,
        tokenizer_sha256=hashlib.sha256(tokenizer.json_bytes).hexdigest(),
        length_scale=length_scale,
        bucket_edges_tokens=edges,
        sources=tuple(sources),
        shards=tuple(shards),
        tokens_by_domain=dict(sorted(domains.items())),
        tokens_by_bucket=buckets,
        documents_by_bucket=counts,
        core_share=sum(n for domain, n in domains.items() if domain in CORE_DOMAINS) / total,
        mixes={mix.stage: _mix_report(shards, mix, tokens, edges) for mix, tokens in mixes},
    )


def _mix_report(shards: list[ShardEntry], mix: StageMix, stage_tokens: int, edges: tuple[int, ...]) -> dict[str, Any]:
    """What the stage would draw from this data; a stage that cannot run is reported, not refused, here."""
    cells = {Cell(s.source, s.domain, s.bucket): s.tokens for s in shards}
    ends = dict(zip(BUCKET_NAMES, (*edges, sys.maxsize), strict=True))
    longest = {cell: ends[cell.bucket] for cell in cells}
    try:
        return {"possible": True, **plan_mix(cells, mix, stage_tokens=stage_tokens, longest=longest).as_dict()}
    except DataError as error:
        return {"possible": False, "stage": mix.stage, "reasons": [str(error)]}


def _fingerprint(
    spec: PrepareSpec,
    tokenizer: TokenizerSpec,
    mixes: Sequence[tuple[StageMix, int]],
    base_dir: Path,
    length_scale: float,
) -> str:
    inputs = []
    for source in spec.sources:
        for path in source_files(source, base_dir):
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            inputs += [(str(p), (stat := p.stat()).st_size, stat.st_mtime_ns) for p in files]
    if tokenizer.path:
        path = (base_dir / Path(tokenizer.path).expanduser()).resolve()
        inputs += [
            (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in (path, path / "tokenizer.json") if p.is_file()
        ]
    values = (FORMAT_VERSION, dataclasses.asdict(spec), dataclasses.asdict(tokenizer), length_scale, inputs)
    mix_values = [(dataclasses.asdict(mix), tokens) for mix, tokens in mixes]
    return hashlib.sha256(repr((values, mix_values)).encode()).hexdigest()


def _publish(work: Path, out: Path) -> None:
    """Swap the finished folder in; an older one is kept beside it as ``<out>.previous``."""
    for path in (*work.glob("*.done"), *work.glob("*.hashes"), work / "trained.json", work / "fingerprint"):
        path.unlink(missing_ok=True)
    if out.exists():
        previous = out.with_name(f"{out.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        out.rename(previous)
    work.rename(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
