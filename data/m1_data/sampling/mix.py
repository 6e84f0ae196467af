"""The mix of a stage: the share of its tokens that each part of the data gives, and how far that is from the target.

A cell is what one source holds in one length bucket. Shares are fitted to two marginals, length classes and domains, by
iterative proportional fitting (Deming & Stephan 1940) from the tokens at hand. Where both cannot be met, lengths win.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m1_data.arrays import Floats
from m1_data.errors import DataError
from m1_data.spec import CORE_DOMAINS, StageMix
from m1_data.storage.cell import Cell

LONG_QA = "long_qa"
"""Domain that is drawn only in the last fifth of a stage."""

LONG_QA_FROM = 0.8
"""Progress through a stage from which long question-answer data takes its share (MiniMax-01, section 4.2)."""

TOLERANCE = 0.005
"""A share further than this from its target is reported with a reason."""

_ROUNDS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A wanted and a reached share of tokens, 0 to 1."""

    wanted: float
    reached: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPlan:
    """The token shares of a stage, what they amount to, and where they miss the target."""

    stage: str
    shares: dict[Cell, float]
    """Share of tokens per cell; sums to 1. Cells of domain ``long_qa`` are not in it."""
    long_qa: dict[Cell, float]
    """Share of every token in the last fifth of the stage; empty when there is no such data."""
    length_classes: dict[str, Share]
    domains: dict[str, Share]
    core: Share
    epochs: dict[Cell, float]
    """Passes over each cell in this stage; empty when the stage's tokens are unknown."""
    reasons: tuple[str, ...]
    """One sentence for every target that is missed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in plain JSON types."""
        return {
            "stage": self.stage,
            "shares": [{**cell._asdict(), "share": share} for cell, share in self.shares.items()],
            "long_qa": [{**cell._asdict(), "share": share} for cell, share in self.long_qa.items()],
            "length_classes": {k: _pair(v) for k, v in self.length_classes.items()},
            "domains": {k: _pair(v) for k, v in self.domains.items()},
            "core": _pair(self.core),
            "epochs": [{**cell._asdict(), "epochs": n} for cell, n in self.epochs.items()],
            "reasons": list(self.reasons),
        }


def plan_mix(
    cells: Mapping[Cell, int],
    mix: StageMix,
    *,
    stage_tokens: int | None,
    seq_len_tokens: int | None = None,
    longest: Mapping[Cell, int] | None = None,
) -> MixPlan:
    """Fit token shares to the length classes and domains of ``mix`` and return the plan.

    Domain weights count within the core domains and within the others; ``core_share`` divides the tokens between the
    two groups. A class or domain without data gives its share to those that have some, and a reason says so.

    Args:
        cells: tokens at hand per cell; empty cells are ignored.
        stage_tokens: tokens the stage draws; None leaves ``max_epochs`` unchecked.
        seq_len_tokens: tokens a row; documents longer than a row will be cut, which is reported.
        longest: tokens of the longest document per cell; long question-answer cells that exceed ``mix.seq_len_tokens``
            are excluded, because a question that is cut off its text teaches nothing.

    Raises:
        DataError: no data for any wanted length class, or ``max_epochs`` passes are fewer tokens than the stage draws.
    """
    wanted = {"short": mix.short, "medium": mix.medium, "long": mix.long}
    usable = [c for c, n in cells.items() if n > 0 and c.domain != LONG_QA and wanted[c.length_class] > 0]
    if not usable:
        raise DataError(
            f"stage {mix.stage} wants {_list(k for k, v in wanted.items() if v > 0)} documents and there are none",
            where=f"{sum(1 for n in cells.values() if n > 0)} non-empty cells in the prepared data",
            fix="prepare more data, or change the stage's short, medium and long shares",
        )
    tokens = np.array([cells[c] for c in usable], dtype=np.float64)
    caps = np.full(len(usable), np.inf)
    if stage_tokens is not None:
        caps = tokens * mix.max_epochs / max(stage_tokens, 1)
        if caps.sum() < 1 - 1e-9:
            raise DataError(
                f"stage {mix.stage} draws {stage_tokens:,} tokens; the usable data has {int(tokens.sum()):,}, "
                f"{mix.max_epochs:g} passes are {int(tokens.sum() * mix.max_epochs):,}",
                where=f"length classes {_list(k for k, v in wanted.items() if v > 0)}",
                fix="prepare more data, train fewer tokens in this stage, or raise its max_epochs",
            )
    domain_wanted = _domain_targets(usable, tokens, mix)
    shares = _fit(
        tokens / tokens.sum(),
        [([c.domain for c in usable], domain_wanted), ([c.length_class for c in usable], _normalised(wanted))],
        caps,
    )
    by_cell = dict(zip(usable, shares.tolist(), strict=True))
    plan_classes = {k: Share(wanted=v, reached=_total(by_cell, length_class=k)) for k, v in _normalised(wanted).items()}
    domains = {
        d: Share(wanted=domain_wanted.get(d, 0.0), reached=_total(by_cell, domain=d))
        for d in sorted({*domain_wanted, *mix.domains} - {LONG_QA})
    }
    core = Share(wanted=mix.core_share, reached=sum(v for c, v in by_cell.items() if c.domain in CORE_DOMAINS))
    qa = {c: n for c, n in cells.items() if n > 0 and c.domain == LONG_QA}
    too_long = [c for c in qa if longest is not None and longest[c] > mix.seq_len_tokens]
    for cell in too_long:
        del qa[cell]
    long_qa = _long_qa_shares(qa, mix, stage_tokens)
    epochs = {}
    if stage_tokens is not None:
        kept = 1 - (1 - LONG_QA_FROM) * sum(long_qa.values())
        epochs = {c: v * stage_tokens * kept / cells[c] for c, v in by_cell.items()}
        epochs |= {c: v * stage_tokens * (1 - LONG_QA_FROM) / cells[c] for c, v in long_qa.items()}
    reasons = _reasons(cells, mix, plan_classes, domains, core, by_cell, dict(zip(usable, caps.tolist(), strict=True)))
    if too_long and mix.long_qa_share:
        reasons.append(f"long question-answer data in {_list(c.bucket for c in too_long)} does not fit into a row")
    if mix.long_qa_share and sum(long_qa.values()) < mix.long_qa_share - TOLERANCE:
        reasons.append(
            f"long question-answer data: {sum(long_qa.values()):.1%} of the last fifth instead of "
            f"{mix.long_qa_share:.1%}; " + (f"{mix.max_epochs:g} passes hold no more" if qa else "there is none")
        )
    if seq_len_tokens is not None and mix.seq_len_tokens != seq_len_tokens:
        reasons.append(f"rows have {seq_len_tokens:,} tokens, the mix was written for {mix.seq_len_tokens:,}")
    return MixPlan(
        stage=mix.stage,
        shares=by_cell,
        long_qa=long_qa,
        length_classes=plan_classes,
        domains=domains,
        core=core,
        epochs=epochs,
        reasons=tuple(reasons),
    )


def interpolate(previous: MixPlan | None, current: MixPlan, progress: float) -> dict[Cell, float]:
    """Return the token share of each cell at ``progress`` (0 to 1) through the stage; the shares sum to 1.

    Source weights move linearly from the previous stage's to this one's (MiniMax-01, section 4.2), while the length
    classes are this stage's throughout. From ``LONG_QA_FROM`` on, long question-answer data takes its share.
    """
    shares = current.shares
    if previous is not None:
        cells = list(shares)
        old, new = _by_source(previous.shares), _by_source(shares)
        sources = {s: (1 - progress) * old.get(s, 0.0) + progress * new[s] for s in new}
        classes: dict[str, float] = {}
        for cell, share in shares.items():
            classes[cell.length_class] = classes.get(cell.length_class, 0.0) + share
        fitted = _fit(
            np.array([shares[c] for c in cells]),
            [([c.source for c in cells], _normalised(sources)), ([c.length_class for c in cells], classes)],
            np.full(len(cells), np.inf),
        )
        shares = dict(zip(cells, fitted.tolist(), strict=True))
    if progress < LONG_QA_FROM or not current.long_qa:
        return dict(shares)
    kept = 1 - sum(current.long_qa.values())
    return {cell: share * kept for cell, share in shares.items()} | current.long_qa


def _fit(prior: Floats, marginals: list[tuple[list[str], dict[str, float]]], caps: Floats) -> Floats:
    """Scale ``prior`` to every marginal in turn, never above ``caps``; the last marginal is met best."""
    indexed = []
    for names, targets in marginals:
        order = sorted(set(names))
        group = np.array([order.index(n) for n in names])
        goal = np.array([targets.get(n, 0.0) for n in order])
        if goal.sum() > 0:
            indexed.append((group, goal / goal.sum(), len(order)))
    shares = np.minimum(prior, caps)
    for _ in range(_ROUNDS):
        before = shares
        for group, goal, count in indexed:
            sums = np.bincount(group, shares, count)
            factor = np.divide(goal, sums, out=np.zeros(count), where=sums > 0)
            shares = np.minimum(shares * factor[group], caps)
        if np.abs(shares - before).max() < 1e-12:
            break
    group, goal, count = indexed[-1]
    for _ in range(2):
        for want in (goal, None):
            shares = _top_up(shares, prior, caps, group, count, want)
    return shares / shares.sum()


def _top_up(shares: Floats, prior: Floats, caps: Floats, group: Any, count: int, goal: Floats | None) -> Floats:
    """Hand what is missing to cells below their cap: first inside each group of ``goal``, else (None) to any."""
    for _ in range(len(shares) + 1):
        free = caps - shares > 1e-15
        weight = np.where(free, prior, 0.0)
        if goal is None:
            missing = np.array([max(0.0, 1 - shares.sum())])
            where, groups = np.zeros_like(group), 1
        else:
            missing, where, groups = np.maximum(0, goal - np.bincount(group, shares, count)), group, count
        total = np.bincount(where, weight, groups)
        rate = np.divide(missing, total, out=np.zeros(groups), where=total > 0)
        if rate.max(initial=0.0) * prior.max() < 1e-13:
            break
        shares = np.minimum(shares + weight * rate[where], caps)
    return shares


def _domain_targets(cells: list[Cell], tokens: Floats, mix: StageMix) -> dict[str, float]:
    weights: dict[str, float] = {}
    for cell, count in zip(cells, tokens, strict=True):
        weights[cell.domain] = weights.get(cell.domain, 0.0) + float(count)
    if mix.domains:
        weights = {d: w for d, w in mix.domains.items() if d in weights and w > 0} or weights
    core = sum(w for d, w in weights.items() if d in CORE_DOMAINS)
    rest = sum(weights.values()) - core
    core_share = mix.core_share if core and rest else float(bool(core))
    return {d: w / core * core_share if d in CORE_DOMAINS else w / rest * (1 - core_share) for d, w in weights.items()}


def _long_qa_shares(qa: dict[Cell, int], mix: StageMix, stage_tokens: int | None) -> dict[Cell, float]:
    total = sum(qa.values())
    if not total or not mix.long_qa_share:
        return {}
    share = mix.long_qa_share
    if stage_tokens is not None:
        share = min(share, total * mix.max_epochs / ((1 - LONG_QA_FROM) * stage_tokens))
    return {cell: share * count / total for cell, count in qa.items()}


def _reasons(
    cells: Mapping[Cell, int],
    mix: StageMix,
    classes: dict[str, Share],
    domains: dict[str, Share],
    core: Share,
    shares: dict[Cell, float],
    caps: dict[Cell, float],
) -> list[str]:
    """Say why each missed target is missed."""
    reasons = []
    full = [c for c, v in shares.items() if v >= caps[c] - 1e-9]
    limited = f"; {mix.max_epochs:g} passes are reached by {_list(f'{c.source}/{c.bucket}' for c in full)}"
    for name, share in classes.items():
        if abs(share.wanted - share.reached) > TOLERANCE:
            why = limited if full else ""
            if not any(n > 0 and c.length_class == name and c.domain != LONG_QA for c, n in cells.items()):
                why = f"; there are no {name} documents"
            reasons.append(f"{name} documents: {share.reached:.1%} of the tokens instead of {share.wanted:.1%}{why}")
    missing_domains = {d: w for d, w in mix.domains.items() if w > 0 and d != LONG_QA}
    for name in missing_domains:
        if name not in {c.domain for c in shares}:
            reasons.append(f"no documents of domain {name} in the length classes this stage uses")
    if abs(core.wanted - core.reached) > TOLERANCE:
        groups = {c.domain in CORE_DOMAINS for c in shares}
        why = _empty_pairs(shares, classes) or (limited if full else "")
        if len(groups) == 1:
            why = "; there is no other data" if True in groups else "; there is no such data"
        reasons.append(
            f"{', '.join(CORE_DOMAINS)} together: {core.reached:.1%} of the tokens instead of {core.wanted:.1%}{why}"
        )
    for name, share in domains.items():
        if name in {c.domain for c in shares} and abs(share.wanted - share.reached) > TOLERANCE:
            why = _empty_pairs(shares, classes, name) or (limited if full else "; the length classes leave no room")
            reasons.append(f"domain {name}: {share.reached:.1%} of the tokens instead of {share.wanted:.1%}{why}")
    return reasons


def _empty_pairs(shares: dict[Cell, float], classes: dict[str, Share], domain: str = "") -> str:
    present = {(c.domain, c.length_class) for c in shares}
    missing = [
        f"no {name} documents of domain {d}"
        for name, share in classes.items()
        for d in sorted({c.domain for c in shares})
        if share.wanted > 0 and (d, name) not in present and domain in ("", d)
    ]
    return f"; {', '.join(missing)}" if missing else ""


def _total(shares: Mapping[Cell, float], **where: str) -> float:
    return sum(v for c, v in shares.items() if all(getattr(c, k) == want for k, want in where.items()))


def _by_source(shares: Mapping[Cell, float]) -> dict[str, float]:
    out: dict[str, float] = {}
    for cell, share in shares.items():
        out[cell.source] = out.get(cell.source, 0.0) + share
    return out


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {k: v / total for k, v in weights.items()} if total > 0 else dict(weights)


def _pair(share: Share) -> dict[str, float]:
    return {"wanted": share.wanted, "reached": share.reached}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
