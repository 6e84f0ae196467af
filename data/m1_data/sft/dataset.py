"""Samples packed into rows for fine-tuning, with the interface of the pretraining rows."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from m1_data.arrays import Ints
from m1_data.sampling.loader import PackedBatch, Segment, collate
from m1_data.sampling.packing import best_fit
from m1_data.seeded_random import derive_seed, permutation
from m1_data.sft.choice import Selection, choose
from m1_data.sft.stats import SFTStats, count
from m1_data.sft.store import SampleStore

_ORDER = 3
"""Raised when the same samples would come in other rows; see ``stage_draw.order_version``."""


class SFTDataset:
    """Packed samples. Row i belongs to epoch ``i // rows_per_epoch``; every epoch holds each drawn sample once.

    The tokens stay on the disk; what is kept in memory are some numbers per sample.

    Raises:
        DataError: see ``choose``.
    """

    def __init__(self, store: SampleStore, selection: Selection) -> None:
        self.store, self.seq_len, self._seed = store, selection.seq_len, selection.seed
        self.pad_id = store.manifest.pad_id
        choice = choose(store, selection)
        self._drawn, self._lengths = choice.drawn, choice.lengths[choice.drawn]
        self._epochs: dict[int, tuple[Ints, Ints]] = {}
        self.rows_per_epoch: int = best_fit(self._lengths, self.seq_len)[1]
        self.stats: SFTStats = count(
            store, choice, rows=self.rows_per_epoch, seq_len=self.seq_len, weights=selection.weights
        )
        self.held_out: list[list[int]] = _packed(choice.held_out, choice.lengths, self.seq_len)
        """The samples of each row of held-out ones."""
        digest = hashlib.sha256(repr((self._seed, self.seq_len, self.pad_id, store.content_hash())).encode())
        digest.update(self._drawn.tobytes() + self._lengths.tobytes())
        self.fingerprint: str = f"order-{_ORDER}:{digest.hexdigest()}"
        """The version of the order, and a SHA-256 of everything that determines the rows and their order."""

    def __len__(self) -> int:
        return self.rows_per_epoch

    def stats_dict(self) -> dict[str, Any]:
        """Return ``stats`` in plain JSON types."""
        return dataclasses.asdict(self.stats)

    def row(self, index: int) -> list[Segment]:
        """Return the samples of row ``index``, 0 or more; from ``rows_per_epoch`` on the next epoch begins."""
        return [self.segment(number) for number in self.numbers(index)]

    def numbers(self, index: int) -> list[int]:
        """Return the numbers, in the store, of the samples of row ``index``."""
        epoch, at = divmod(index, self.rows_per_epoch)
        order, bounds = self._epoch(epoch)
        found: list[int] = self._drawn[order[bounds[at] : bounds[at + 1]]].tolist()
        return found

    def batch(self, row_ids: list[int]) -> PackedBatch:
        """Concatenate rows into one micro-batch and return it."""
        return collate([self.row(i) for i in row_ids], row_ids, seq_len=self.seq_len, pad_id=self.pad_id)

    def segment(self, number: int) -> Segment:
        """Return a sample of the store, cut to a row: what follows its last token is not trained."""
        encoded = self.store.tokens(number)
        ids, trained = encoded.ids[: self.seq_len], encoded.trained[: self.seq_len]
        end = np.array([self.pad_id], dtype=np.int64)
        return Segment(ids, np.concatenate([ids[1:], end]), np.concatenate([trained[1:], [False]]))

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Places in ``drawn`` by row, and where each row begins. Best fit needs the same number of rows for any order."""
        if epoch not in self._epochs:
            order = permutation(len(self._lengths), derive_seed(self._seed, "sft", epoch))
            rows, number = best_fit(self._lengths[order], self.seq_len)
            place = np.empty(number, dtype=np.int64)
            place[permutation(number, derive_seed(self._seed, "sft rows", epoch))] = np.arange(number)
            by_row = np.argsort(place[rows], kind="stable")
            bounds = np.searchsorted(place[rows][by_row], np.arange(number + 1))
            self._epochs = {epoch: (order[by_row], bounds)}
        return self._epochs[epoch]


def _packed(samples: Ints, lengths: Ints, seq_len: int) -> list[list[int]]:
    rows, number = best_fit(lengths[samples], seq_len)
    packed: list[list[int]] = [[] for _ in range(number)]
    for sample, row in zip(samples.tolist(), rows.tolist(), strict=True):
        packed[row].append(sample)
    return packed
