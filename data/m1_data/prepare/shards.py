"""The shards one source is written to, and which of its documents are held out from training."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

from m1_data.prepare.clean import may_be_held_out
from m1_data.spec import BUCKET_NAMES, SourceSpec
from m1_data.storage.indexed import IndexedWriter
from m1_data.tokenizer import LoadedTokenizer

HELD_OUT_KEEPS = 16
"""Documents of the same source and bucket that are kept for training before each one that is held out."""


class ShardWriters:
    """Writers of one source's documents, one per length bucket.

    Args:
        kind: ``shards``, or ``held_out`` for the documents that are never trained on.
        edges: exclusive upper edges of the buckets, tokens.
    """

    def __init__(
        self, work: Path, kind: str, source: SourceSpec, tokenizer: LoadedTokenizer, edges: tuple[int, ...]
    ) -> None:
        self._work, self._source, self._tokenizer, self._edges = work, source, tokenizer, edges
        self._folder = f"{kind}/{source.name}"
        self._writers: dict[str, IndexedWriter] = {}
        self.documents: Counter[str] = Counter()
        """By bucket."""
        self.tokens = self.longest = 0
        """End-of-document tokens not counted."""

    def want(self, text: str, tokens: int, kept: ShardWriters, *, most: int) -> bool:
        """Whether a document is to be held out: its hash says so, and ``kept`` has many more of its bucket.

        The decision looks at the text and at what came before it from the same source, so it is the same in every run.
        """
        bucket = self._bucket(tokens)
        have = self.documents[bucket]
        return have < most and kept.documents[bucket] >= HELD_OUT_KEEPS * (have + 1) and may_be_held_out(text)

    def add(self, ids: Any) -> None:
        """Append one document to the shard of its bucket."""
        bucket, t = self._bucket(len(ids)), self._tokenizer
        if bucket not in self._writers:
            self._writers[bucket] = IndexedWriter(self._work / self._folder / bucket, t.vocab_size, t.eod_id)
        self._writers[bucket].add(ids)
        self.documents[bucket] += 1
        self.tokens, self.longest = self.tokens + len(ids), max(self.longest, len(ids))

    def close(self) -> list[dict[str, Any]]:
        """Make the shards complete; their manifest entries."""
        where = {"source": self._source.name, "domain": self._source.domain}
        return [
            {**where, "bucket": bucket, "prefix": f"{self._folder}/{bucket}", **self._writers[bucket].close()}
            for bucket in BUCKET_NAMES
            if bucket in self._writers
        ]

    def _bucket(self, tokens: int) -> str:
        return BUCKET_NAMES[bisect_right(self._edges, tokens)]
