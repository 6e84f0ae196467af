"""Packed rows as torch batches: the same rows for every number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m1_data.errors import DataError
from m1_data.sampling.mix import MixPlan, interpolate, plan_mix
from m1_data.sampling.packing import RowPlanner
from m1_data.seeded_random import derive_seed
from m1_data.spec import StageMix
from m1_data.storage.store import Store, open_store

ORDER_VERSION = 2
"""Raised whenever the same seed and data would give other rows."""


class Segment(NamedTuple):
    """One document's part of a row: int64 tokens and labels and a bool loss mask, all ``[length]``."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """A micro-batch: rows concatenated into one sequence of T tokens, documents isolated by ``cu_seqlens``."""

    tokens: Tensor
    """[1, T] int64."""
    labels: Tensor
    """[1, T] int64: the next token of the same document; the pad id where ``loss_mask`` is 0 for want of one."""
    loss_mask: Tensor
    """[1, T] fp32, 1 where the label is trained."""
    position_ids: Tensor
    """[1, T] int64, restarting with every document, every piece of a cut one, and padding."""
    cu_seqlens: Tensor
    """[documents + 1] int32 edges, padding included as documents of its own."""
    doc_lengths: tuple[int, ...]
    """Tokens of each document, padding included: the differences of ``cu_seqlens``, on the host."""
    sample_ids: tuple[int, ...]
    """Numbers of the rows in the batch."""
    trained_tokens: int
    """The sum of ``loss_mask``."""
    shard: tuple[int, int] = (0, 1)
    """This rank's number and the ranks that share the sequence. With several, the tensors with a T axis hold this rank's
    tokens; ``cu_seqlens`` and ``doc_lengths`` describe the whole sequence."""

    def zigzag(self, rank: int, ranks: int) -> PackedBatch:
        """Return this rank's part of the batch: chunks ``rank`` and ``2 * ranks - 1 - rank`` of ``2 * ranks`` equal ones.

        Every rank gets an equal share of the work of causal attention this way.

        Raises:
            DataError: the tokens do not divide into that many parts.
        """
        if ranks == 1:
            return self
        tokens = self.tokens.shape[1]
        if tokens % (2 * ranks):
            raise DataError(
                f"{tokens} tokens do not divide into {2 * ranks} parts, two for each of {ranks} context-parallel ranks",
                where=f"micro-batch of samples {self.sample_ids[0]}..{self.sample_ids[-1]}",
                fix="choose a context length that twice parallel.context divides",
            )
        cut: dict[str, Any] = {
            name: zigzag(getattr(self, name), rank, ranks) for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
        return dataclasses.replace(self, **cut, trained_tokens=int(cut["loss_mask"].sum()), shard=(rank, ranks))

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def zigzag(tokens: Tensor, rank: int, ranks: int) -> Tensor:
    """Return the part of ``[1, T]`` that context-parallel ``rank`` has, ``[1, T / ranks]``."""
    parts = tokens.chunk(2 * ranks, 1)
    return tokens if ranks == 1 else torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], 1)


def collate(rows: Sequence[Sequence[Segment]], row_ids: Sequence[int], *, seq_len: int, pad_id: int) -> PackedBatch:
    """Concatenate rows of segments into one batch.

    Each row is padded to ``seq_len`` tokens with one untrained segment of ``pad_id``.
    """
    segments: list[Segment] = []
    for row in rows:
        segments.extend(row)
        missing = seq_len - sum(len(s.tokens) for s in row)
        if missing:
            pad = np.full(missing, pad_id, dtype=np.int64)
            segments.append(Segment(pad, pad, np.zeros(missing, dtype=bool)))
    lengths = np.array([len(s.tokens) for s in segments], dtype=np.int64)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    trained = np.concatenate([s.trained for s in segments])
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([s.tokens for s in segments]))[None],
        labels=torch.from_numpy(np.concatenate([s.labels for s in segments]))[None],
        loss_mask=torch.from_numpy(trained.astype(np.float32))[None],
        position_ids=torch.from_numpy(np.arange(edges[-1]) - np.repeat(edges[:-1], lengths))[None],
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        doc_lengths=tuple(lengths.tolist()),
        sample_ids=tuple(row_ids),
        trained_tokens=int(trained.sum()),
    )


def batch_rows(step: int, *, global_batch: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[list[int]]:
    """Return the row numbers of one data-parallel rank at ``step``, one list per micro-batch.

    Step s trains rows s * global_batch ... (s + 1) * global_batch - 1 whatever ``dp_size`` is. The ranks' m-th micro-batches
    together are contiguous rows, because the balance loss is taken over them: ranks x micro_batch decides, not either.

    Raises:
        DataError: the global batch does not divide into ranks and micro-batches.
    """
    if global_batch % (dp_size * micro_batch):
        raise DataError(
            f"{global_batch} rows a step do not divide into {dp_size} data-parallel ranks x {micro_batch} rows",
            where=f"step {step}",
            fix="change global_batch_tokens, micro_batch_rows or the number of processes",
        )
    first = step * global_batch + dp_rank * micro_batch
    return [list(range(at, at + micro_batch)) for at in range(first, (step + 1) * global_batch, dp_size * micro_batch)]


class PackedDataset:
    """The rows of one stage. Row i depends on nothing but seed, mix, data, ``seq_len`` and ``num_rows``.

    Args:
        data: folder written by ``m1 prepare-data``, or an opened store.
        mix: what this stage draws; ``previous``, what the stage before drew: source weights move from there.
        seq_len: tokens a row; ``num_rows``: rows in the stage.

    Raises:
        DataError: no prepared data, a broken shard, no documents of a wanted length class, or not enough tokens.
    """

    def __init__(
        self,
        data: Path | Store,
        mix: StageMix,
        previous: StageMix | None,
        *,
        seed: int,
        seq_len: int,
        num_rows: int,
    ) -> None:
        self._store = data if isinstance(data, Store) else open_store(Path(data))
        self._seq_len, self._num_rows = seq_len, num_rows
        lengths = {cell: np.asarray(r.lengths, dtype=np.int64) for cell, r in self._store.readers.items()}
        self._cells = list(lengths)
        tokens = {cell: int(n.sum()) for cell, n in lengths.items()}
        stage_tokens = num_rows * seq_len
        _require_lengths(mix, {c.length_class for c, n in tokens.items() if n})
        longest = {cell: int(n.max(initial=0)) for cell, n in lengths.items()}
        self.mix_plan: MixPlan = plan_mix(
            tokens, mix, stage_tokens=stage_tokens, seq_len_tokens=seq_len, longest=longest
        )
        before = plan_mix(tokens, previous, stage_tokens=None) if previous else None
        self._planner = RowPlanner(
            lengths,
            partial(interpolate, before, self.mix_plan),
            seed=derive_seed(seed, mix.stage),
            seq_len=seq_len,
            num_rows=num_rows,
        )
        digest = hashlib.sha256(repr((ORDER_VERSION, seed, seq_len, num_rows, mix, previous)).encode())
        digest.update(repr((self._store.content_hash, self._store.vocab_size, self._store.eod_id)).encode())
        for cell, counts in lengths.items():
            digest.update(repr((tuple(cell), len(counts))).encode() + counts.tobytes())
        self.fingerprint: str = digest.hexdigest()
        """SHA-256 of everything that determines the rows and their order."""
        self.identity: dict[str, Any] = {
            "the prepared data (content hash)": self._store.content_hash,
            "run.seed": seed,
            "tokens a row": seq_len,
            "rows of the stage": num_rows,
            **{f"stages.{mix.stage}.{key}": value for key, value in dataclasses.asdict(mix).items() if key != "stage"},
            **{
                f"stages.{m.stage}.{key}": value
                for m in [previous]
                if m
                for key, value in dataclasses.asdict(m).items()
            },
        }
        """The same in plain values by name, to say which of them changed."""

    def __len__(self) -> int:
        return self._num_rows

    def row(self, index: int) -> list[Segment]:
        """Return the parts of documents that make up row ``index``, without padding.

        The label of a token is the next token of the same document, also for the last token of a piece that was cut
        from a longer document; the document's last token has none.

        Raises:
            IndexError: no such row.
            DataError: a token id is not in the vocabulary, or a shard ends early.
        """
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        pieces = self._planner.row(index)
        return [
            self._segment(*piece)
            for piece in zip(
                pieces.cell.tolist(),
                pieces.document.tolist(),
                pieces.start.tolist(),
                pieces.length.tolist(),
                strict=True,
            )
        ]

    def batch(self, row_ids: list[int]) -> PackedBatch:
        """Concatenate rows into one micro-batch and return it."""
        return collate([self.row(i) for i in row_ids], row_ids, seq_len=self._seq_len, pad_id=self._store.eod_id)

    def _segment(self, cell: int, document: int, start: int, length: int) -> Segment:
        name = self._cells[cell]
        reader = self._store.readers[name]
        available = min(length + 1, int(reader.lengths[document]) - start)
        ids = np.asarray(reader.get(document, start, available), dtype=np.int64)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._store.vocab_size:
            at = int(np.flatnonzero((ids < 0) | (ids >= self._store.vocab_size))[0])
            raise DataError(
                f"token id {ids[at]} is outside the vocabulary of {self._store.vocab_size}",
                where=f"source {name.source}, bucket {name.bucket}, document {document}, token {start + at}",
                fix="the shard is damaged or was written with another tokenizer: run m1 prepare-data again",
            )
        labels = np.full(length, self._store.eod_id, dtype=np.int64)
        labels[: available - 1] = ids[1:]
        return Segment(ids[:length], labels, np.arange(length) < available - 1)


def _require_lengths(mix: StageMix, present: set[str]) -> None:
    """Refuse a stage whose point, its long documents, does not exist in the data."""
    for name, share in (("short", mix.short), ("medium", mix.medium), ("long", mix.long)):
        if share > 0 and name not in present:
            raise DataError(
                f"stage {mix.stage} draws {share:.0%} of its tokens from {name} documents and there are none",
                where=f"length classes at hand: {', '.join(sorted(present)) or 'none'}",
                fix="add sources with such documents (format 'packages' joins a package's files), or set the stage's "
                f"'{name}' share to 0",
            )
