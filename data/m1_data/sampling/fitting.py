"""Shares of cells that meet wanted shares of their groups, by iterative proportional fitting (Deming & Stephan 1940)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m1_data.arrays import Floats

Marginals = Sequence[tuple[Sequence[str], Mapping[str, float]]]

_ROUNDS = 500


def fit_shares(prior: Floats, marginals: Marginals, caps: Floats) -> Floats:
    """Scale ``prior`` to every marginal in turn, never above ``caps``; the last marginal is met best.

    Args:
        prior: shares to start from, 0 or more, ``[cells]``; a cell without a prior gets nothing.
        marginals: each cell's group, and the wanted share of each group, for one or more groupings.
        caps: the largest share of each cell, ``[cells]``; they sum to 1 or more.

    Returns:
        Shares that sum to 1, float64 ``[cells]``.
    """
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
