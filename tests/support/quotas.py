"""What a stage draws, given directly by the test instead of by a mix."""

from __future__ import annotations

from dataclasses import dataclass

from m1_data.storage.cell import Cell


@dataclass(frozen=True)
class LinearQuotas:
    """Shares that move linearly from ``first`` to ``last`` over a stage of ``tokens``; documents may be repeated for ever."""

    tokens: int
    first: dict[Cell, float]
    last: dict[Cell, float]
    whole: frozenset[Cell] = frozenset()

    @property
    def quotas(self) -> dict[Cell, int]:
        cells = list(self.first)
        rounded = {cell: int(n) for cell, n in self.tokens_by(1.0).items()}
        return rounded | {cells[-1]: self.tokens - sum(rounded[cell] for cell in cells[:-1])}

    @property
    def limits(self) -> dict[Cell, int]:
        return dict.fromkeys(self.first, self.tokens)

    def tokens_by(self, progress: float) -> dict[Cell, float]:
        return {
            cell: (first * progress + (self.last[cell] - first) * progress**2 / 2) * self.tokens
            for cell, first in self.first.items()
        }


def constant(tokens: int, shares: dict[Cell, float]) -> LinearQuotas:
    """The same shares throughout the stage."""
    return LinearQuotas(tokens, shares, shares)
