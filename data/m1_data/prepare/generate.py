"""Needle sources: documents that are generated, not read, and hidden in a sample of the other sources' text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from m1_data.errors import DataError
from m1_data.prepare.account import SourceRecord
from m1_data.prepare.shards import ShardTarget, ShardWriters
from m1_data.prepare.tally import Progress
from m1_data.sampling.needles import SHORTEST_TOKENS, Haystack, training_documents
from m1_data.seeded_random import derive_seed
from m1_data.spec import SourceSpec
from m1_data.storage.manifest import ShardEntry, SourceEntry
from m1_data.storage.store import open_shard


def generate_needles(
    source: SourceSpec,
    text_shards: Sequence[ShardEntry],
    target: ShardTarget,
    *,
    context_tokens: Sequence[int],
    progress: Progress,
) -> SourceRecord:
    """Write ``source.max_docs`` needle documents and return the source's record.

    Args:
        text_shards: complete shards, relative to ``target.folder``, in whose text the needles are hidden.
        context_tokens: the stages' context lengths in tokens; those too short for a needle document get none.
        progress: called with the phase generate after each document.

    Raises:
        DataError: the source does not say how many documents, no context is long enough, or there is no text.
    """
    contexts = [tokens for tokens in context_tokens if tokens > SHORTEST_TOKENS]
    if not source.max_docs or not contexts:
        raise DataError(
            f"source {source.name!r} generates needles without end"
            if contexts
            else f"no stage's context has the {SHORTEST_TOKENS} tokens a needle document needs",
            where=f"[[data.sources]] {source.name}",
            fix="say how many documents: max_docs = 1000" if contexts else "raise curriculum.length_scale",
        )
    haystack = Haystack.of_text([open_shard(target.folder, entry, whole=False) for entry in text_shards])
    shards = ShardWriters(target, "shards", source)
    generated = training_documents(haystack, contexts, seed=derive_seed("needles", source.name))
    for number, ids in enumerate(islice(generated, source.max_docs), 1):
        shards.add(ids)
        progress("generate", source.name, number, 0)
    entry = SourceEntry(
        name=source.name,
        domain=source.domain,
        files=(),
        records=source.max_docs,
        documents=source.max_docs,
        utf8_bytes=0,
        tokens=shards.tokens,
        longest_tokens=shards.longest,
        rejected={},
        noted={},
        verified_ids=0,
    )
    return SourceRecord(source=entry, shards=shards.close())
