"""The mix of a stage: how many of its tokens each part of the data gives, and when.

A cell is what one source holds in one length bucket. Shares are fitted to two marginals, length classes and domains, from the
tokens at hand. Where both cannot be met, lengths win; ``max_epochs`` is never exceeded. What a stage draws in the end, in whole
rows, is counted from its rows: ``m1_data.sampling.mix_report``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from m1_data.arrays import Floats
from m1_data.errors import DataError
from m1_data.sampling.fitting import fit_shares
from m1_data.spec import CORE_DOMAINS, StageMix
from m1_data.storage.cell import Cell

LONG_QA = "long_qa"
"""Domain that is drawn only in the last fifth of a stage."""

LONG_QA_FROM = 0.8
"""Progress through a stage from which long question-answer data takes its share (MiniMax-01, section 4.2)."""


class TooLittleData(DataError):
    """The prepared data cannot give what a stage draws.

    Args:
        missing_classes: the length classes of which there is nothing; none when there are too few tokens.
        tokens_of_passes: tokens that ``max_epochs`` passes over the usable data have, when these are too few.
    """

    def __init__(
        self, what: str, *, where: str, fix: str, missing_classes: tuple[str, ...] = (), tokens_of_passes: int = 0
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.missing_classes, self.tokens_of_passes = missing_classes, tokens_of_passes


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPlan:
    """The tokens that a stage draws of each cell. Cells of domain ``long_qa`` are drawn in its last fifth only."""

    mix: StageMix
    stage_tokens: int
    first: dict[Cell, float]
    """Share of the text per cell when the stage begins; sums to 1, as ``last`` does."""
    last: dict[Cell, float]
    """Share of the text per cell when the stage ends."""
    long_qa: dict[Cell, float]
    """Share of every token in the last fifth of the stage; empty when there is no such data."""
    wanted_domains: dict[str, float]
    """Wanted share of the stage's tokens per domain; there is none for ``long_qa``."""
    quotas: dict[Cell, int]
    """Tokens of the stage per cell; they sum to ``stage_tokens``."""
    limits: dict[Cell, int]
    """Tokens of ``max_epochs`` passes over each cell; no quota is larger."""
    too_long: tuple[Cell, ...]
    """Long question-answer cells that are not drawn, because their documents do not fit into a row."""

    @property
    def whole(self) -> frozenset[Cell]:
        """The cells whose documents are never cut."""
        return frozenset(self.long_qa)

    def tokens_by(self, progress: float) -> dict[Cell, float]:
        """Return the tokens that the first ``progress`` (0 to 1) of the stage draws of each cell.

        Source weights move linearly from the previous stage's to this one's (MiniMax-01, section 4.2), while the length
        classes are this stage's throughout. From ``LONG_QA_FROM`` on, long question-answer data takes its share.
        """
        late, qa_share = max(0.0, progress - LONG_QA_FROM), sum(self.long_qa.values())
        text = {}
        for cell, last in self.last.items():
            first = self.first[cell]
            drawn, early = (first * p + (last - first) * p * p / 2 for p in (progress, LONG_QA_FROM))
            text[cell] = (drawn - qa_share * (drawn - early) if late else drawn) * self.stage_tokens
        return text | {cell: share * late * self.stage_tokens for cell, share in self.long_qa.items()}


def plan_mix(
    cells: Mapping[Cell, int],
    mix: StageMix,
    *,
    stage_tokens: int,
    previous: StageMix | None = None,
    longest: Mapping[Cell, int] | None = None,
) -> MixPlan:
    """Fit token shares to the length classes and domains of ``mix`` and return the plan.

    Shares are shares of all tokens of the stage, long question-answer data included. Domain weights count within the core
    domains and within the others; ``core_share`` divides the tokens between the two groups.

    Args:
        cells: tokens at hand per cell; empty cells are ignored.
        stage_tokens: tokens the stage draws.
        previous: the mix of the stage before, from whose source weights the stage starts; None: it has its own throughout.
        longest: tokens of the longest document per cell; long question-answer cells that exceed ``mix.seq_len_tokens``
            are excluded, because a question that is cut off its text teaches nothing.

    Raises:
        TooLittleData: there is no document of a wanted length class, or ``max_epochs`` passes over the usable data are fewer
            tokens than the stage draws.
    """
    _refuse_missing_class(cells, mix)
    usable = _usable(cells, mix)
    limits = {c: int(cells[c] * mix.max_epochs + 1e-6) for c in usable}
    if sum(limits.values()) < stage_tokens:
        _refuse_too_few_tokens(cells, usable, limits, mix, stage_tokens)
    qa = {c: n for c, n in cells.items() if n > 0 and c.domain == LONG_QA}
    too_long = tuple(c for c in qa if longest is not None and longest[c] > mix.seq_len_tokens)
    long_qa = _long_qa_shares({c: n for c, n in qa.items() if c not in too_long}, mix, stage_tokens)
    in_stage = {c: share * (1 - LONG_QA_FROM) for c, share in long_qa.items()}
    text_share = 1 - sum(in_stage.values())

    caps = np.array([limits[c] for c in usable]) / max(stage_tokens, 1)
    domains = _domain_targets(usable, cells, mix, text_share)
    classes = {
        name: max(0.0, share - sum(v for c, v in in_stage.items() if c.length_class == name))
        for name, share in normalised(wanted_classes(mix)).items()
    }
    by_class = ([c.length_class for c in usable], classes)
    last = fit_shares(_at_hand(usable, cells), [([c.domain for c in usable], domains), by_class], caps)
    first = last
    before = _text_by_source(cells, previous) if previous else {}
    if before:
        first = fit_shares(last, [([c.source for c in usable], before), by_class], caps)
    limits |= {c: int(qa[c] * mix.max_epochs + 1e-6) for c in long_qa}
    plan = MixPlan(
        mix=mix,
        stage_tokens=stage_tokens,
        first=dict(zip(usable, first.tolist(), strict=True)),
        last=dict(zip(usable, last.tolist(), strict=True)),
        long_qa=long_qa,
        wanted_domains={d: share * text_share for d, share in domains.items()},
        quotas={},
        limits=limits,
        too_long=too_long,
    )
    plan.quotas.update(_whole_tokens(plan.tokens_by(1.0), limits, stage_tokens))
    return plan


def wanted_classes(mix: StageMix) -> dict[str, float]:
    """Return the weight of each length class in ``mix``."""
    return {"short": mix.short, "medium": mix.medium, "long": mix.long}


def _usable(cells: Mapping[Cell, int], mix: StageMix) -> list[Cell]:
    wanted = wanted_classes(mix)
    return [c for c, n in cells.items() if n > 0 and c.domain != LONG_QA and wanted[c.length_class] > 0]


def _refuse_missing_class(cells: Mapping[Cell, int], mix: StageMix) -> None:
    """Refuse a stage whose point, its long documents, does not exist in the data."""
    present = {c.length_class for c, n in cells.items() if n > 0}
    wanted = {name: share for name, share in wanted_classes(mix).items() if share > 0}
    missing = tuple(name for name in wanted if name not in present)
    if not missing:
        if _usable(cells, mix):
            return
        missing = tuple(wanted)  # all of it is long question-answer data
    shares = _list(f"{wanted[name]:.0%} of its tokens from {name} documents" for name in missing)
    raise TooLittleData(
        f"stage {mix.stage} draws {shares} and there are none",
        where=f"length classes at hand: {_list(k for k in wanted_classes(mix) if k in present) or 'none'}",
        fix="add sources with such documents (format 'packages' joins a package's files), or set these shares of the stage to 0",
        missing_classes=missing,
    )


def _refuse_too_few_tokens(
    cells: Mapping[Cell, int], usable: list[Cell], limits: Mapping[Cell, int], mix: StageMix, stage_tokens: int
) -> None:
    at_hand = sum(cells[c] for c in usable)
    raise TooLittleData(
        f"stage {mix.stage} draws {stage_tokens:,} tokens; the usable data has {at_hand:,}, "
        f"{mix.max_epochs:g} passes are {sum(limits.values()):,}",
        where=f"length classes {_list(k for k, v in wanted_classes(mix).items() if v > 0)}",
        fix="prepare more data, train fewer tokens in this stage, or raise its max_epochs",
        tokens_of_passes=sum(limits.values()),
    )


def _at_hand(usable: list[Cell], cells: Mapping[Cell, int]) -> Floats:
    tokens = np.array([cells[c] for c in usable], dtype=np.float64)
    return tokens / tokens.sum()


def _text_by_source(cells: Mapping[Cell, int], mix: StageMix) -> dict[str, float]:
    """Return the share of each source in the text of a stage that nothing limits; empty when no cell is usable."""
    usable = _usable(cells, mix)
    if not usable:
        return {}
    shares = fit_shares(
        _at_hand(usable, cells),
        [
            ([c.domain for c in usable], _domain_targets(usable, cells, mix, 1.0)),
            ([c.length_class for c in usable], normalised(wanted_classes(mix))),
        ],
        np.full(len(usable), np.inf),
    )
    out: dict[str, float] = {}
    for cell, share in zip(usable, shares.tolist(), strict=True):
        out[cell.source] = out.get(cell.source, 0.0) + share
    return out


def _domain_targets(
    usable: list[Cell], cells: Mapping[Cell, int], mix: StageMix, text_share: float
) -> dict[str, float]:
    """Return the wanted share of each domain in the text, which is ``text_share`` of the stage; they sum to 1."""
    weights: dict[str, float] = {}
    for cell in usable:
        weights[cell.domain] = weights.get(cell.domain, 0.0) + cells[cell]
    if mix.domains:
        weights = {d: w for d, w in mix.domains.items() if d in weights and w > 0} or weights
    core = sum(w for d, w in weights.items() if d in CORE_DOMAINS)
    rest = sum(weights.values()) - core
    core_share = min(1.0, mix.core_share / text_share) if core and rest else float(bool(core))
    return {d: w / core * core_share if d in CORE_DOMAINS else w / rest * (1 - core_share) for d, w in weights.items()}


def _long_qa_shares(qa: dict[Cell, int], mix: StageMix, stage_tokens: int) -> dict[Cell, float]:
    total = sum(qa.values())
    if not total or not mix.long_qa_share:
        return {}
    share = min(mix.long_qa_share, total * mix.max_epochs / ((1 - LONG_QA_FROM) * stage_tokens))
    return {cell: share * count / total for cell, count in qa.items()}


def _whole_tokens(wanted: Mapping[Cell, float], limits: Mapping[Cell, int], total: int) -> dict[Cell, int]:
    """Round ``wanted`` to integers that sum to ``total`` and exceed no limit: what is missing goes where most was cut off."""
    quotas = {c: min(int(n), limits[c]) for c, n in wanted.items()}
    missing = total - sum(quotas.values())
    order = sorted(wanted, key=lambda c: quotas[c] - wanted[c])
    while missing > 0:
        for cell in order:
            more = min(missing, limits[cell] - quotas[cell], max(1, missing // len(order)))
            quotas[cell] += more
            missing -= more
    return quotas


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights divided by their sum; weights of nothing but zeros as they are."""
    total = sum(weights.values())
    return {k: v / total for k, v in weights.items()} if total > 0 else dict(weights)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
