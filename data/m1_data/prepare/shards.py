"""Step 6, bucket and write: the shards of one source, and which of its documents are held out from training."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_data.prepare.encode import EncodedBatch
from m1_data.prepare.tally import Progress
from m1_data.spec import BUCKET_NAMES, SourceSpec
from m1_data.storage.indexed import IndexedWriter
from m1_data.storage.manifest import ShardEntry
from m1_data.storage.text_digest import text_digest
from m1_data.tokenizer import LoadedTokenizer

HELD_OUT_KEEPS = 16
"""Documents of the same source and bucket that are kept for training before each one that is held out."""

HELD_OUT_ONE_IN = 32
"""One in this many texts may be held out, by its hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTarget:
    """The place and the layout of the shards of all sources."""

    folder: Path
    """The folder that becomes the prepared data."""
    tokenizer: LoadedTokenizer
    edges: tuple[int, ...]
    """Exclusive upper edges of the length buckets, in tokens; one fewer than ``BUCKET_NAMES``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenDocuments:
    """The result of ``bucket_and_write``. The shards are not complete until they are closed."""

    shards: ShardWriters
    held_out: ShardWriters
    documents: int
    """Number of documents in both."""
    utf8_bytes: int
    """UTF-8 bytes of their texts."""
    verified_ids: int
    """Number of ids that were compared with the tokenizers library."""
    held_out_digests: str
    """The ``text_digest`` of each held-out document, as hexadecimal digits, one after the other."""


def bucket_and_write(
    batches: Iterable[EncodedBatch],
    source: SourceSpec,
    target: ShardTarget,
    *,
    most_held_out: int,
    progress: Progress,
) -> WrittenDocuments:
    """Write every document to the shard of its length bucket, or to the held-out shard of that bucket.

    Args:
        batches: the documents in their order.
        most_held_out: held-out documents of each bucket at most.
        progress: called with the phase encode after each batch.
    """
    shards, held_out = ShardWriters(target, "shards", source), ShardWriters(target, "held_out", source)
    documents = utf8_bytes = verified_ids = 0
    digests: list[str] = []
    for batch in batches:
        for n, text in enumerate(batch.texts):
            ids = batch.ids[batch.offsets[n] : batch.offsets[n + 1]]
            held = held_out.wants(text, len(ids), shards, most=most_held_out)
            (held_out if held else shards).add(ids)
            if held:
                digests.append(text_digest(text).hex())
        documents += len(batch.texts)
        utf8_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in batch.texts)
        verified_ids += batch.verified_ids
        progress("encode", source.name, documents, utf8_bytes)
    return WrittenDocuments(
        shards=shards,
        held_out=held_out,
        documents=documents,
        utf8_bytes=utf8_bytes,
        verified_ids=verified_ids,
        held_out_digests="".join(digests),
    )


def may_be_held_out(text: str) -> bool:
    """Return whether the text's hash is among the one in ``HELD_OUT_ONE_IN`` that may stay out of training."""
    return text_digest(text)[-1] % HELD_OUT_ONE_IN == 0


class ShardWriters:
    """Writers of one source's documents, one per length bucket. What an interrupted run left there is removed.

    Args:
        kind: ``shards``, or ``held_out`` for the documents that are never trained on.
    """

    def __init__(self, target: ShardTarget, kind: str, source: SourceSpec) -> None:
        self._target, self._source = target, source
        self._folder = f"{kind}/{source.name}"
        self._writers: dict[str, IndexedWriter] = {}
        self.documents: Counter[str] = Counter()
        """Number of documents by bucket."""
        self.tokens = self.longest = 0
        """Tokens of all documents and of the longest one; end-of-document tokens are not counted."""
        shutil.rmtree(target.folder / self._folder, ignore_errors=True)

    def wants(self, text: str, tokens: int, kept: ShardWriters, *, most: int) -> bool:
        """Return whether a document is to be held out: its hash says so, and ``kept`` has many more of its bucket.

        The decision looks at the text and at what came before it from the same source, so it is the same in every run.
        """
        bucket = self._bucket(tokens)
        have = self.documents[bucket]
        return have < most and kept.documents[bucket] >= HELD_OUT_KEEPS * (have + 1) and may_be_held_out(text)

    def add(self, ids: Any) -> None:
        """Append one document, an integer array ``[tokens]``, to the shard of its bucket."""
        bucket, tokenizer = self._bucket(len(ids)), self._target.tokenizer
        if bucket not in self._writers:
            prefix = self._target.folder / self._folder / bucket
            self._writers[bucket] = IndexedWriter(prefix, tokenizer.vocab_size, tokenizer.eod_id)
        self._writers[bucket].add(ids)
        self.documents[bucket] += 1
        self.tokens, self.longest = self.tokens + len(ids), max(self.longest, len(ids))

    def close(self) -> tuple[ShardEntry, ...]:
        """Make the shards complete and return their manifest entries, shortest bucket first."""
        return tuple(
            ShardEntry(
                source=self._source.name,
                domain=self._source.domain,
                bucket=bucket,
                prefix=f"{self._folder}/{bucket}",
                **self._writers[bucket].close(),
            )
            for bucket in BUCKET_NAMES
            if bucket in self._writers
        )

    def _bucket(self, tokens: int) -> str:
        return BUCKET_NAMES[bisect_right(self._target.edges, tokens)]
