"""What one stage draws from prepared data: whether it can, its rows in order, and the count of them.

``m1 prepare-data``, the check before training and training itself ask here, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m1_data.arrays import Ints
from m1_data.sampling.mix import LONG_QA, MixPlan, TooLittleData, plan_mix
from m1_data.sampling.mix_report import MixReport, report_mix
from m1_data.sampling.packing import RowPlanner
from m1_data.seeded_random import derive_seed
from m1_data.spec import BUCKET_EDGES_TOKENS, BUCKET_NAMES, StageMix
from m1_data.storage.cell import Cell
from m1_data.storage.store import Store

ORDER_VERSION = 3
"""Raised whenever the same seed and data would give other rows."""

_FIRST_NAMED_ORDER = 3
"""Fingerprints of datasets of earlier versions do not say their order."""

Lengths = Mapping[Cell, Ints]
"""Tokens of each document per cell, end-of-document tokens included."""


def order_version(fingerprint: str) -> int:
    """Return the ``ORDER_VERSION`` of the dataset that had this fingerprint; 2 for those of earlier versions."""
    name, colon, _ = fingerprint.partition(":")
    return int(name.removeprefix("order-")) if colon else _FIRST_NAMED_ORDER - 1


def document_lengths(store: Store) -> dict[Cell, Ints]:
    """Return the tokens of each document per cell, int64 ``[documents]``, in the order of the store."""
    return {cell: np.asarray(reader.lengths, dtype=np.int64) for cell, reader in store.readers.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDraw:
    """The rows that a stage draws: ``num_rows`` of ``seq_len`` tokens."""

    mix: StageMix
    previous: StageMix | None
    """What the stage before drew: source weights move from there."""
    seq_len: int
    num_rows: int
    seed: int
    """The run's seed."""

    @property
    def tokens(self) -> int:
        """Tokens that the rows have room for."""
        return self.num_rows * self.seq_len

    @property
    def order(self) -> str:
        """A SHA-256 of everything but the documents that determines the rows and their order."""
        values = (ORDER_VERSION, self.seed, self.seq_len, self.num_rows, self.mix, self.previous)
        return hashlib.sha256(repr(values).encode()).hexdigest()

    def plan(self, lengths: Lengths) -> MixPlan:
        """Plan the tokens of each cell.

        Raises:
            TooLittleData: the documents cannot give the stage's rows.
        """
        return plan_mix(
            _tokens(lengths),
            self.mix,
            stage_tokens=self.tokens,
            previous=self.previous,
            longest={cell: int(n.max(initial=0)) for cell, n in lengths.items()},
        )

    def planner(self, lengths: Lengths, plan: MixPlan) -> RowPlanner:
        """Return the planner of the rows."""
        return RowPlanner(
            lengths,
            plan,
            seed=derive_seed(self.seed, self.mix.stage),
            seq_len=self.seq_len,
            num_rows=self.num_rows,
        )

    def report(
        self, lengths: Lengths, plan: MixPlan, drawn: Mapping[Cell, int], *, without: Collection[int] = ()
    ) -> MixReport:
        """Compare ``drawn``, the tokens of each cell in the rows except ``without``, with the mix."""
        rows = self.num_rows - len(without)
        return report_mix(plan, _tokens(lengths), drawn, rows_tokens=rows * self.seq_len)


def draws_of(mixes: Sequence[tuple[StageMix, int]], *, seed: int) -> list[StageDraw]:
    """Return what consecutive stages draw, given each one's mix and tokens."""
    return [
        StageDraw(
            mix=mix,
            previous=mixes[n - 1][0] if n else None,
            seq_len=mix.seq_len_tokens,
            num_rows=max(1, tokens // mix.seq_len_tokens),
            seed=seed,
        )
        for n, (mix, tokens) in enumerate(mixes)
    ]


def count_mix(draw: StageDraw, lengths: Lengths) -> MixReport:
    """Plan all rows of a stage, count their tokens and return the report: about a second for a million documents.

    Raises:
        TooLittleData: the documents cannot give the stage's rows.
    """
    plan = draw.plan(lengths)
    return draw.report(lengths, plan, draw.planner(lengths, plan).count())


def refusals(draws: Sequence[StageDraw], lengths: Lengths) -> dict[str, TooLittleData]:
    """Return why each stage that cannot run on these documents cannot, by its name; empty when all can."""
    found = {}
    for draw in draws:
        try:
            draw.plan(lengths)
        except TooLittleData as error:
            found[draw.mix.stage] = error
    return found


def rebucketed(lengths: Lengths, length_scale: float) -> dict[Cell, Ints]:
    """Return about what ``m1 prepare-data`` makes of the same text at another ``length_scale``.

    Long question-answer documents, which are made to measure, are not in it. A seventeenth of each cell is not either, but at
    least one document is: so many may be held out.
    """
    edges = [round(edge * length_scale) for edge in BUCKET_EDGES_TOKENS]
    out: dict[Cell, list[Ints]] = {}
    for cell, counts in lengths.items():
        if cell.domain == LONG_QA:
            continue
        bucket = np.array([bisect_right(edges, n - 1) for n in counts.tolist()], dtype=np.int64)
        for number in np.unique(bucket).tolist():
            out.setdefault(cell._replace(bucket=BUCKET_NAMES[number]), []).append(counts[bucket == number])
    together = {cell: np.sort(np.concatenate(parts)) for cell, parts in out.items()}
    return {cell: counts[: len(counts) - len(counts) // 17] for cell, counts in together.items()}


def _tokens(lengths: Lengths) -> dict[Cell, int]:
    return {cell: int(n.sum(dtype=np.int64)) for cell, n in lengths.items()}
