"""Finds the rank that keeps the others waiting, from the seconds that every rank reports with its step. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

WINDOW = 16
"""Steps looked at together: one slow step is nobody's fault."""
REPORT_EVERY = 100
"""Steps before the same rank is named again."""
SLOWER, AT_LEAST_S = 1.2, 0.02
"""A straggler takes so many times the ranks' median and these seconds besides."""


class Stragglers:
    """Feed it every step; it names ranks whose median over the last ``WINDOW`` steps is far above their peers'.

    Args:
        pipeline: stages; only ranks of the same one have the same kinds and number of layers.
    """

    def __init__(self, *, pipeline: int = 1) -> None:
        self._steps: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: dict[int, int] = {}
        self._pipeline = pipeline

    def notice(self, step: int, rank_seconds: Sequence[float]) -> list[tuple[int, float, float]]:
        """(rank, its seconds, the median of its pipeline stage) of every straggler that was not named lately.

        Args:
            step: of the whole run.
            rank_seconds: of each rank, of work that waits for nobody (``StepResult.rank_seconds``): in the forward and
                backward pass ranks wait for each other in every layer and all take the same time.
        """
        self._steps.append(rank_seconds)
        if len(self._steps) < WINDOW:
            return []
        own = [median(seconds) for seconds in zip(*self._steps, strict=True)]
        size = len(own) // self._pipeline
        found = []
        for rank, seconds in enumerate(own):
            peers = own[rank // size * size :][:size]  # Megatron numbers the ranks of a pipeline stage in a row
            typical = median(peers) if len(peers) > 2 else min(peers)
            late = seconds > SLOWER * typical + AT_LEAST_S
            if late and step - self._named.get(rank, -REPORT_EVERY) >= REPORT_EVERY:
                self._named[rank] = step
                found.append((rank, seconds, typical))
        return found
