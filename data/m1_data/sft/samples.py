"""From the files of conversations to encoded samples: everything that reads texts, and no choice between samples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from m1_data.chat.conversations import Conversation
from m1_data.chat.encoder import SHIPPED_TEMPLATE, ChatEncoder, Encoded
from m1_data.chat.reasoning import EarlierReasoning, samples_of
from m1_data.chat.rows import BadRows, FileTally, Row, conversations_in, rows_of
from m1_data.errors import DataError, shown
from m1_data.spec import REFLECTION_PATTERNS

FORMAT = 1
"""Raised when the same files would give other samples, or when the files of a store change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSettings:
    """All that the samples depend on.

    Args:
        paths: files of conversations, and folders that ``datasets`` saved; see ``chat.rows``.
        tokenizer_dir: see ``ChatEncoder``; ``chat_template`` and ``date`` too.
        held_out: ``text_digest`` of texts that must not be trained; conversations with one of them are dropped.
        dialect: a name of ``dialects.DIALECTS`` for all files; ``auto`` takes that of each file's first row.
        ignored_keys: keys of the rows that are taken out of them.
        bad_rows: what to do with rows that are no conversation, or none that the template can write.
        earlier_reasoning: see ``samples_of``.
        patterns: see ``PatternCounter``.
    """

    paths: tuple[Path, ...]
    tokenizer_dir: Path
    chat_template: Path | None = None
    date: str = ""
    held_out: frozenset[bytes] = frozenset()
    dialect: str = "auto"
    ignored_keys: tuple[str, ...] = ()
    bad_rows: BadRows = "error"
    earlier_reasoning: EarlierReasoning = "keep"
    patterns: tuple[str, ...] = REFLECTION_PATTERNS

    def key(self) -> str:
        """Return a SHA-256 of the settings and of the bytes of every file that they name.

        Raises:
            DataError: a file is missing or cannot be read.
        """
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        template = [self.chat_template] if self.chat_template else []
        tokenizer = [path for name in names if (path := self.tokenizer_dir / name).is_file()]
        values = {
            "format": FORMAT,
            "paths": [str(path) for path in self.paths],
            "data": [[_digest(file) for file in _files(path)] for path in self.paths],
            "tokenizer": {path.name: _digest(path) for path in tokenizer},
            "template": [_digest(path) for path in (*template, SHIPPED_TEMPLATE)],
            "held_out": hashlib.sha256(b"".join(sorted(self.held_out))).hexdigest(),
            "given": bool(self.chat_template),
        }
        for name in ("date", "dialect", "ignored_keys", "bad_rows", "earlier_reasoning", "patterns"):
            values[name] = getattr(self, name)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all files, as ``rows_of``."""
        return rows_of(self.paths, dialect=self._dialect, ignored_keys=self.ignored_keys)

    def tally(self) -> SampleTally:
        """Return an empty tally of these files."""
        return SampleTally([FileTally(str(path), self._dialect) for path in self.paths])

    @property
    def _dialect(self) -> str:
        return "" if self.dialect == "auto" else self.dialect


@dataclass(slots=True)
class SampleTally:
    """What became of the rows."""

    files: list[FileTally]
    refused: Counter[str] = field(default_factory=Counter)
    """Conversations that the template cannot write, by reason."""
    counts: Counter[str] = field(default_factory=Counter)
    """``samples``; and of them ``unwanted`` and ``dropped_held_out``."""
    unused_keys: Counter[str] = field(default_factory=Counter)

    def add(self, more: SampleTally) -> None:
        """Add what became of the rows behind those that are counted."""
        for file, behind in zip(self.files, more.files, strict=True):
            file.dialect = behind.dialect or file.dialect
            file.rows += behind.rows
            file.bad += behind.bad
            file.first_bad = file.first_bad or behind.first_bad
        self.refused += more.refused
        self.counts += more.counts
        self.unused_keys += more.unused_keys


def samples_in(
    rows: Iterable[Row], settings: SampleSettings, encoder: ChatEncoder, tally: SampleTally
) -> Iterator[tuple[Conversation, Encoded]]:
    """Yield each sample of the rows that may be trained, with its token ids and its mask.

    Args:
        tally: is counted up.

    Raises:
        DataError: a bad row (unless they are skipped); file and line are named.
    """
    conversations = conversations_in(rows, tally.files, ignored_keys=settings.ignored_keys, bad_rows=settings.bad_rows)
    named = (replace(row, digest=_conversation_digest(row)) for row in conversations)
    samples = (sample for row in named for sample in samples_of(row, settings.earlier_reasoning))
    skip = None if settings.bad_rows == "error" else lambda error: tally.refused.update([error.what])
    for conversation, encoded in encoder.encode_all(samples, skip):
        tally.counts["samples"] += 1
        tally.unused_keys.update(conversation.unused_keys)
        if not conversation.wanted:
            tally.counts["unwanted"] += 1
        elif conversation.repeats(settings.held_out):
            tally.counts["dropped_held_out"] += 1
        else:
            yield conversation, encoded


def _conversation_digest(conversation: Conversation) -> bytes:
    """128 bits of what is said: the same for two rows with the same turns, and for all samples of one row."""
    digest = xxhash.xxh3_128()
    for m in conversation.messages:
        calls = "".join(f"{call.name}{call.arguments}" for call in m.tool_calls)
        digest.update("\x1f".join((m.role, m.reasoning, m.content, calls, "\x1e")).encode())
    return digest.digest()


def _files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataError(
            "there is no such file of conversations", where=shown(path), fix="check the paths in sft.data"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror}", where=shown(path)) from error
