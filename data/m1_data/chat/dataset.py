"""Conversations packed into rows for fine-tuning, with the interface of the pretraining rows."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m1_data.chat.conversations import Conversation
from m1_data.chat.encoder import ChatEncoder, Encoded
from m1_data.chat.reasoning import EarlierReasoning, samples_of
from m1_data.chat.rows import BadRows, FileTally, read_conversations
from m1_data.errors import DataError
from m1_data.sampling.loader import PackedBatch, Segment, collate
from m1_data.sampling.packing import best_fit
from m1_data.seeded_random import derive_seed, permutation

OverLength = Literal["error", "drop", "truncate"]

CORE_DOMAINS = ("math", "code")
CORE_TARGET = 0.60
"""Share of mathematics and code among the cold-start conversations (MiniMax-M1, section 4)."""

_REFLECTION = re.compile(
    r"\b(wait|hmm|let me (?:double-?check|check|verify|re-?think|reconsider|re-?examine)|on second thought|"
    r"alternatively|i made a mistake|that(?:'s| is) not right|going back)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadFile:
    """What a file of conversations turned out to be."""

    file: str
    dialect: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTStats:
    """Counts over all conversations of a dataset."""

    files: list[ReadFile]
    read: int
    """Number of rows in the files."""
    bad_rows: dict[str, int]
    """Number of rows that are left out because they are no conversation, or none that the template can write, by reason."""
    samples: int
    """Number of conversations after those with earlier reasoning are split into several."""
    conversations: int
    """Number of samples that are trained."""
    tokens: int
    trained_tokens: int
    rows: int
    padding_share: float
    core_share: float
    """Share of conversations with domain math or code among those that name a domain; NaN when none does."""
    core_target: float
    without_domain: int
    reflections: int
    """Number of matches of self-checking phrases ("wait", "let me check", ...) in reasoning and answers."""
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


class SFTDataset:
    """Packed conversations. Row i belongs to epoch ``i // rows_per_epoch``; every epoch holds each conversation once.

    Args:
        paths: files of conversations, and folders that ``datasets`` saved; see ``rows``.
        tokenizer_dir: see ``ChatEncoder``; ``chat_template`` too.
        over_length: what to do with conversations of more than ``seq_len`` tokens; ``truncate`` keeps the beginning.
        max_dropped_share: the share of conversations that may be dropped.
        date: see ``ChatEncoder``.
        held_out: ``text_digest`` of texts that must not be trained; conversations with one of them are dropped.
        dialect: a name of ``dialects.DIALECTS`` for all files; ``auto`` takes that of each file's first row.
        ignored_keys: keys of the rows that are taken out of them.
        bad_rows: what to do with rows that are no conversation, or none that the template can write.
        earlier_reasoning: see ``samples_of``.

    Raises:
        DataError: an unreadable file or line (file and line named), a conversation that is too long under ``error``,
            too many that are dropped, or nothing left to train.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        tokenizer_dir: Path,
        seq_len: int,
        seed: int,
        over_length: OverLength = "error",
        chat_template: Path | None = None,
        max_dropped_share: float = 1.0,
        date: str = "",
        held_out: Collection[bytes] = (),
        dialect: str = "auto",
        ignored_keys: Collection[str] = (),
        bad_rows: BadRows = "error",
        earlier_reasoning: EarlierReasoning = "keep",
    ) -> None:
        self._seq_len, self._seed = seq_len, seed
        self._encoder = ChatEncoder(Path(tokenizer_dir), Path(chat_template) if chat_template else None, date=date)
        self._conversations: list[Conversation] = []
        self._encoded: list[Encoded] = []
        counts: Counter[str] = Counter()
        self._unused_keys: Counter[str] = Counter()
        self._files = [FileTally(str(path), "" if dialect == "auto" else dialect) for path in paths]
        refused: Counter[str] = Counter()
        samples = (
            sample
            for path, tally in zip(paths, self._files, strict=True)
            for row in read_conversations(Path(path), tally, ignored_keys=ignored_keys, bad_rows=bad_rows)
            for sample in samples_of(row, earlier_reasoning)
        )
        skip = None if bad_rows == "error" else lambda error: refused.update([error.what])
        longest = 0
        for conversation, encoded in self._encoder.encode_all(samples, skip):
            counts["samples"] += 1
            self._unused_keys.update(conversation.unused_keys)
            if not conversation.wanted:
                counts["unwanted"] += 1
                continue
            if conversation.repeats(held_out):
                counts["dropped_held_out"] += 1
                continue
            longest = max(longest, len(encoded.ids))
            if len(encoded.ids) > seq_len:
                if over_length == "error":
                    raise DataError(
                        f"the conversation has {len(encoded.ids):,} tokens, a row has {seq_len:,}",
                        where=conversation.where,
                        fix="set sft.over_length to drop or truncate, or raise sft.context_tokens",
                    )
                counts["dropped_over_length" if over_length == "drop" else "truncated"] += 1
                if over_length == "drop":
                    continue
                encoded = Encoded(encoded.ids[:seq_len], encoded.trained[:seq_len])
            if not encoded.trained[1:].any():
                counts["dropped_untrained"] += 1
                continue
            self._conversations.append(conversation)
            self._encoded.append(encoded)
        self._encoder.close()
        counts["read"] = sum(file.rows for file in self._files)
        self._bad_rows = sum((file.bad for file in self._files), refused)
        counts["bad"] = self._bad_rows.total()
        self._refuse_losses(counts, longest, max_dropped_share, where=", ".join(map(str, paths)))
        self._lengths = np.array([len(e.ids) for e in self._encoded], dtype=np.int64)
        self._epochs: dict[int, list[list[int]]] = {}
        self.rows_per_epoch: int = best_fit(self._lengths, seq_len)[1]
        self.stats: SFTStats = self._count(counts)
        digest = hashlib.sha256(repr((1, seed, seq_len, self._encoder.pad_id)).encode())
        for encoded in self._encoded:
            digest.update(len(encoded.ids).to_bytes(8, "little") + encoded.ids.tobytes() + encoded.trained.tobytes())
        self.fingerprint: str = digest.hexdigest()
        """SHA-256 of everything that determines the rows and their order."""

    def __len__(self) -> int:
        return self.rows_per_epoch

    def stats_dict(self) -> dict[str, Any]:
        """Return ``stats`` in plain JSON types."""
        return dataclasses.asdict(self.stats)

    def row(self, index: int) -> list[Segment]:
        """Return the conversations of row ``index``, 0 or more; from ``rows_per_epoch`` on the next epoch begins."""
        epoch, at = divmod(index, self.rows_per_epoch)
        return [self._segment(i) for i in self._epoch(epoch)[at]]

    def batch(self, row_ids: list[int]) -> PackedBatch:
        """Concatenate rows into one micro-batch and return it."""
        return collate([self.row(i) for i in row_ids], row_ids, seq_len=self._seq_len, pad_id=self._encoder.pad_id)

    def preview(self, n: int) -> Iterator[list[tuple[str, bool]]]:
        """Yield the first ``n`` conversations, each as a list of rendered (text, trained) spans."""
        for conversation in self._conversations[:n]:
            merged: list[tuple[str, bool]] = []
            for span in self._encoder.spans(conversation):
                if merged and merged[-1][1] == span.trained:
                    merged[-1] = (merged[-1][0] + span.text, span.trained)
                else:
                    merged.append((span.text, span.trained))
            yield merged

    def _refuse_losses(self, counts: Counter[str], longest: int, most: float, *, where: str) -> None:
        dropped = counts["dropped_over_length"] + counts["dropped_untrained"] + counts["bad"]
        if self._encoded and dropped <= most * (counts["samples"] + counts["bad"]):
            return
        reasons = {
            "bad": "that are bad rows ("
            + "; ".join(f"{count:,} {reason}" for reason, count in self._bad_rows.most_common())
            + ")",
            "dropped_over_length": f"longer than a row of {self._seq_len:,} tokens (the longest has {longest:,})",
            "dropped_untrained": f"with no answer in the first {self._seq_len:,} tokens",
            "dropped_held_out": "with a text that is held out to measure on",
            "unwanted": "that ask for no training (weight 0, train false)",
        }
        raise DataError(
            f"{dropped:,} of {counts['read']:,} conversations would be dropped"
            if self._encoded
            else f"no conversation of {counts['read']:,} is left to train",
            where=f"{where}: " + ", ".join(f"{counts[key]:,} {words}" for key, words in reasons.items() if counts[key]),
            fix=("mend the bad rows" if counts["bad"] else "raise sft.context_tokens")
            + (f", or set sft.max_dropped_share (now {most:g}) if this is wanted" if self._encoded else ""),
        )

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Conversations per row. Best fit needs the same number of rows for any order of equal lengths."""
        if epoch not in self._epochs:
            order = permutation(len(self._lengths), derive_seed(self._seed, "sft", epoch))
            rows, count = best_fit(self._lengths[order], self._seq_len)
            packed: list[list[int]] = [[] for _ in range(count)]
            for conversation, row in zip(order.tolist(), rows.tolist(), strict=True):
                packed[row].append(conversation)
            shuffled = permutation(count, derive_seed(self._seed, "sft rows", epoch))
            self._epochs = {epoch: [packed[i] for i in shuffled]}
        return self._epochs[epoch]

    def _segment(self, index: int) -> Segment:
        ids, trained = self._encoded[index]
        end = np.array([self._encoder.pad_id], dtype=np.int64)
        return Segment(ids, np.concatenate([ids[1:], end]), np.concatenate([trained[1:], [False]]))

    def _count(self, counts: Counter[str]) -> SFTStats:
        named = [c.domain for c in self._conversations if c.domain]
        texts = (
            t
            for c in self._conversations
            for m in c.messages
            if m.role == "assistant"
            for t in (m.reasoning, m.content)
        )
        tokens = int(self._lengths.sum())
        return SFTStats(
            conversations=len(self._encoded),
            tokens=tokens,
            trained_tokens=sum(int(e.trained[1:].sum()) for e in self._encoded),
            rows=self.rows_per_epoch,
            padding_share=1 - tokens / (self.rows_per_epoch * self._seq_len),
            core_share=sum(d in CORE_DOMAINS for d in named) / len(named) if named else float("nan"),
            core_target=CORE_TARGET,
            without_domain=len(self._conversations) - len(named),
            reflections=sum(len(_REFLECTION.findall(text)) for text in texts),
            unused_keys=dict(self._unused_keys.most_common()),
            files=[ReadFile(file=f.file, dialect=f.dialect, rows=f.rows) for f in self._files],
            bad_rows=dict(self._bad_rows.most_common()),
            **{
                name: counts[name]
                for name in (
                    "read",
                    "samples",
                    "unwanted",
                    "dropped_over_length",
                    "truncated",
                    "dropped_untrained",
                    "dropped_held_out",
                )
            },
        )
