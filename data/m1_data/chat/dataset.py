"""Conversations packed into rows for fine-tuning, with the interface of the pretraining rows."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m1_data.chat.conversations import Conversation, read_conversations
from m1_data.chat.encoder import ChatEncoder, Encoded
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
class SFTStats:
    """Counts over all conversations of a dataset."""

    conversations: int
    """Number of conversations that are trained."""
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
    dropped_over_length: int
    truncated: int
    dropped_untrained: int
    """Number of conversations in which no token would be trained."""


class SFTDataset:
    """Packed conversations. Row i belongs to epoch ``i // rows_per_epoch``; every epoch holds each conversation once.

    Args:
        paths: JSON Lines files of OpenAI messages.
        tokenizer_dir: see ``ChatEncoder``; ``chat_template`` too.
        over_length: what to do with conversations of more than ``seq_len`` tokens; ``truncate`` keeps the beginning.

    Raises:
        DataError: an unreadable file or line (file and line named), a conversation that is too long under ``error``,
            or nothing left to train.
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
    ) -> None:
        self._seq_len, self._seed = seq_len, seed
        self._encoder = ChatEncoder(Path(tokenizer_dir), Path(chat_template) if chat_template else None)
        self._conversations: list[Conversation] = []
        self._encoded: list[Encoded] = []
        counts = {"dropped_over_length": 0, "truncated": 0, "dropped_untrained": 0}
        for path in paths:
            for conversation in read_conversations(Path(path)):
                encoded = self._encoder.encode(conversation)
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
        if not self._encoded:
            raise DataError(
                "no conversation is left to train",
                where=", ".join(map(str, paths)),
                fix="dropped: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()),
            )
        self._lengths = np.array([len(e.ids) for e in self._encoded], dtype=np.int64)
        self._epochs: dict[int, list[list[int]]] = {}
        self.rows_per_epoch: int = best_fit(self._lengths, seq_len)[1]
        self.stats: SFTStats = self._count(counts)
        digest = hashlib.sha256(repr((1, seed, seq_len, self._encoder.pad_id)).encode())
        for encoded in self._encoded:
            digest.update(len(encoded.ids).to_bytes(8, "little") + encoded.ids.tobytes() + encoded.trained.tobytes())
        self.fingerprint: str = digest.hexdigest()
        """SHA-256 of everything that determines the rows and their order."""
        self.identity: dict[str, Any] = {
            "run.seed": seed,
            "tokens a row": seq_len,
            "conversations that are trained": len(self._encoded),
            "the conversations, their rendering or their tokens (SHA-256)": self.fingerprint,
        }
        """The same in plain values by name, to say which of them changed."""

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

    def _count(self, counts: dict[str, int]) -> SFTStats:
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
            **counts,
        )
