"""What a choice of samples holds, in numbers for the screen and the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m1_data.arrays import Ints
from m1_data.sft.choice import Choice
from m1_data.sft.store import SampleStore

CORE_DOMAINS = ("math", "code")
CORE_TARGET = 0.60
"""Share of mathematics and code among the cold-start conversations (MiniMax-M1, section 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStats:
    """What a file of conversations turned out to be, and how often its samples are in a pass."""

    file: str
    dialect: str
    rows: int
    weight: float
    drawn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainStats:
    """The samples of a domain in a pass; the domain is empty for those that name none."""

    domain: str
    conversations: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionStats:
    """Matches of the patterns of reflection in trained texts."""

    conversations: int
    reflective: int
    """Number of conversations with at least one match."""
    trained_tokens: int
    matches: dict[str, int]
    """By pattern."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTStats:
    """Counts over all conversations of a dataset."""

    files: list[FileStats]
    read: int
    """Number of rows in the files."""
    bad_rows: dict[str, int]
    """Number of rows that are left out because they are no conversation, or none that the template can write, by reason."""
    samples: int
    """Number of conversations after those with earlier reasoning are split into several."""
    conversations: int
    """Number of samples in a pass; one that is drawn twice counts twice."""
    tokens: int
    trained_tokens: int
    rows: int
    padding_share: float
    core_share: float
    """Share of conversations with domain math or code among those that name a domain; NaN when none does."""
    core_target: float
    without_domain: int
    domains: list[DomainStats]
    """The most frequent first."""
    before_selection: ReflectionStats
    """Of the samples that could be trained, each once."""
    after_selection: ReflectionStats
    """Of the samples in a pass."""
    unwanted: int
    """Number of conversations that ask for no training: weight 0, or train false in every turn."""
    dropped_over_length: int
    truncated: int
    dropped_untrained: int
    """Number of conversations in which no token of a wanted answer is left: truncation cut it off."""
    unused_keys: dict[str, int]
    """Keys of the lines that nothing reads, and in how many conversations."""
    dropped_held_out: int
    """Number of conversations with a text that pretraining holds out to measure on."""
    held_out: int
    """Number of samples that are never trained, and measured on at the end."""
    left_out: int
    """Number of samples with too few patterns of reflection."""


def count(store: SampleStore, choice: Choice, *, rows: int, seq_len: int, weights: tuple[float, ...] = ()) -> SFTStats:
    """Count what a pass holds.

    Args:
        rows: rows that it is packed into, of ``seq_len`` tokens.
        weights: of the files, 1 without.
    """
    manifest, counts, drawn = store.manifest, choice.counts, choice.drawn
    tokens = int(choice.lengths[drawn].sum())
    domains = sorted(_domains(store, choice), key=lambda d: -d.conversations)
    named = sum(d.conversations for d in domains if d.domain)
    core = sum(d.conversations for d in domains if d.domain in CORE_DOMAINS)
    of_file = np.bincount(store.samples["file"][drawn], minlength=len(manifest.files)).tolist()
    return SFTStats(
        files=[
            FileStats(file=f.file, dialect=f.dialect, rows=f.rows, weight=weight, drawn=n)
            for f, weight, n in zip(manifest.files, weights or [1.0] * len(manifest.files), of_file, strict=True)
        ],
        bad_rows=manifest.bad_rows,
        conversations=len(drawn),
        tokens=tokens,
        trained_tokens=int(choice.trained[drawn].sum()),
        rows=rows,
        padding_share=1 - tokens / (rows * seq_len),
        core_share=core / named if named else float("nan"),
        core_target=CORE_TARGET,
        without_domain=len(drawn) - named,
        domains=domains,
        before_selection=_reflection(store, choice, choice.usable),
        after_selection=_reflection(store, choice, drawn),
        unused_keys=manifest.unused_keys,
        read=counts["read"],
        samples=counts["samples"],
        unwanted=counts["unwanted"],
        dropped_over_length=counts["dropped_over_length"],
        truncated=counts["truncated"],
        dropped_untrained=counts["dropped_untrained"],
        dropped_held_out=counts["dropped_held_out"],
        held_out=counts["held_out"],
        left_out=counts["left_out"],
    )


def _domains(store: SampleStore, choice: Choice) -> list[DomainStats]:
    names, drawn = store.manifest.domains, choice.drawn
    of = store.samples["domain"][drawn]
    parts = [np.bincount(of, w, len(names)) for w in (None, choice.lengths[drawn], choice.trained[drawn])]
    return [
        DomainStats(domain=name, conversations=int(n), tokens=int(tokens), trained_tokens=int(trained))
        for name, n, tokens, trained in zip(names, *parts, strict=True)
        if n
    ]


def _reflection(store: SampleStore, choice: Choice, samples: Ints) -> ReflectionStats:
    matches = store.reflection[samples]
    return ReflectionStats(
        conversations=len(samples),
        reflective=int((matches.sum(1) > 0).sum()),
        trained_tokens=int(choice.trained[samples].sum()),
        matches=dict(zip(store.manifest.patterns, matches.sum(0, dtype=np.int64).tolist(), strict=True)),
    )
