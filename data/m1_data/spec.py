"""The settings of data preparation and sampling: plain frozen dataclasses, standard library only.

``Annotated`` texts are the documentation of the configuration keys; ``m1 init`` and ``m1 config show`` print them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

CORE_DOMAINS = ("stem", "code", "book", "reasoning")
"""Domains that count towards the STEM/code/book/reasoning target share."""

BUCKET_EDGES_TOKENS = (32_768, 131_072, 262_144, 524_288, 1_048_576)
"""Full-scale upper edges of the document-length buckets (exclusive); multiplied by ``length_scale``."""

BUCKET_NAMES = ("lt32k", "32k-128k", "128k-256k", "256k-512k", "512k-1m", "ge1m")
"""Directory-safe names of the six length buckets, shortest first."""

LENGTH_CLASSES: dict[str, tuple[str, ...]] = {
    "short": ("lt32k",),
    "medium": ("32k-128k",),
    "long": ("128k-256k", "256k-512k", "512k-1m", "ge1m"),
}
"""The published recipe's length classes: short < 32K, medium 32K-128K, long > 128K tokens a document."""


SHORTEST_NEEDLE_TOKENS = 64
"""Tokens of the shortest needle document: eight pairs of key and value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One source of documents."""

    name: Annotated[str, "unique name; becomes a folder, so letters, digits, '-' and '_' only"]
    domain: Annotated[str, "stem, code, book, reasoning, general, long_qa or a name of your own"]
    format: Annotated[
        Literal["jsonl", "parquet", "files", "packages", "datasets", "needles"],
        "jsonl (plain, .gz, .zst, .bz2), parquet, files (one document a file), "
        "packages (one document a package), datasets (local or hub, needs the 'hub' extra), "
        "needles (max_docs generated documents that hide keys and ask for them; text comes from the other sources)",
    ]
    path: Annotated[
        str,
        "file, folder (with its sub-folders) or glob; for 'datasets' a path or the name of a data set of the Hub; "
        "none for 'needles'",
    ] = ""
    text_field: Annotated[str, "key or column that holds the text; meta.text is text inside meta"] = "text"
    include: Annotated[tuple[str, ...], "file patterns for 'files' and 'packages'"] = (
        "*.py",
        "*.md",
        "*.rst",
        "*.txt",
    )
    exclude: Annotated[tuple[str, ...], "path patterns excluded from 'files' and 'packages'"] = ()
    split: Annotated[str, "split for 'datasets'"] = "train"
    max_docs: Annotated[int, "stop after this many documents; 0 means all"] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpec:
    """The choice of a tokenizer, or how to train one."""

    path: Annotated[str, "tokenizer.json or a Hugging Face folder; empty: train a byte-level BPE"] = ""
    vocab_size: Annotated[int, "vocabulary of a trained tokenizer, control tokens included"] = 32_000
    train_bytes: Annotated[int, "text read to train a tokenizer, in bytes, spread evenly over the sources"] = 64_000_000
    eod_token: Annotated[str, "end-of-document token appended by id; empty: the first known name the tokenizer has"] = (
        ""
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSpec:
    """The settings of ``m1 prepare-data`` besides the stage mixes."""

    out: Annotated[str, "folder of the prepared data, relative to the configuration file"] = "data"
    sources: Annotated[tuple[SourceSpec, ...], "where the text comes from: [[data.sources]] tables"] = ()
    dedup: Annotated[Literal["exact", "none"], "exact: drop documents equal but for white space, keep the first"] = (
        "exact"
    )
    engine: Annotated[
        Literal["gigatoken", "fastokens", "tokenizers"],
        "encoder; its ids are proved on a sample of every run",
    ] = "gigatoken"
    held_out: Annotated[
        int, "documents of each source and length bucket kept out of training to measure on; needs dedup = exact"
    ] = 16
    verify_docs: Annotated[
        int,
        "first documents of a source whose ids are all compared with the tokenizers library; "
        "of the others a sample is, at least 1 in 1,000",
    ] = 128
    max_bad_share: Annotated[float, "stop when more than this share of a source's records is unusable"] = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMix:
    """The mix that one stage draws from the prepared data. Shares are shares of tokens."""

    stage: Annotated[str, "stage name"]
    seq_len_tokens: Annotated[int, "tokens a row"]
    short: Annotated[float, "share of documents under 32K tokens (scaled)"]
    medium: Annotated[float, "share of documents of 32K to 128K tokens (scaled)"]
    long: Annotated[float, "share of documents over 128K tokens (scaled)"]
    core_share: Annotated[float, "target share of STEM, code, book and reasoning tokens"] = 0.70
    domains: Annotated[dict[str, float], "relative weight of each domain; empty: by tokens at hand"] = field(
        default_factory=dict
    )
    max_epochs: Annotated[float, "passes over a cell (source, bucket) in the stage at most"] = 4.0
    long_qa_share: Annotated[float, "share of long question-answer data in the last fifth of the stage"] = 0.10


REFLECTION_PATTERNS = (
    "wait", "hmm", "recheck", "double-check", "let me check", "let me verify", "let me rethink", "let me reconsider",
    "however", "alternatively", "on second thought", "i made a mistake", "that's not right", "going back",
)  # fmt: skip
"""Words with which reasoning checks itself, as ``m1_data.sft.reflection`` counts them."""
