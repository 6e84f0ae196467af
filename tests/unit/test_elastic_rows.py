"""Which rows a rank trains, for every number of ranks: ``m1 pretrain``'s own planning without its processes."""

from __future__ import annotations

from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any, cast

import pytest

from m1_stages.curriculum import StagePlan
from m1_stages.errors import DataError
from m1_stages.runtime.parallel import Topology
from m1_stages.training.micro_batches import row_ids


def of_ranks(step: int, *, rows: int, dp_size: int, micro_batch_rows: int) -> list[list[list[int]]]:
    """Rows of a step by rank and micro-batch."""
    plan: Any = SimpleNamespace(global_batch_rows=rows, micro_batch_rows=micro_batch_rows)
    ranks = [SimpleNamespace(dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    return [row_ids(cast(StagePlan, plan), cast(Topology, rank), step) for rank in ranks]


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dp_size", range(1, 17))
def test_every_row_once_in_order(dp_size: int, micro_batch_rows: int) -> None:
    for rows in range(dp_size, 4 * dp_size + 1, dp_size):
        for step in range(3):
            ranks = of_ranks(step, rows=rows, dp_size=dp_size, micro_batch_rows=micro_batch_rows)
            sizes = {len(micro) for rank in ranks for micro in rank}
            assert len(sizes) == 1, "equal micro-batches, or ranks would wait for each other"
            assert sizes <= set(range(1, micro_batch_rows + 1))
            in_order = [row for at in zip(*ranks, strict=True) for micro in at for row in micro]
            assert in_order == list(range(step * rows, (step + 1) * rows))


@pytest.mark.parametrize("dp_size", range(2, 9))
def test_a_batch_that_does_not_divide_is_refused_on_every_rank(dp_size: int) -> None:
    """With fewer rows than ranks too."""
    for rows in (n for n in range(1, 25) if n % dp_size):
        for micro_batch_rows in range(1, 5):
            plan: Any = SimpleNamespace(global_batch_rows=rows, micro_batch_rows=micro_batch_rows)
            for rank in range(dp_size):
                topology: Any = SimpleNamespace(dp_rank=rank, dp_size=dp_size)
                with pytest.raises(DataError, match=f"^{rows} rows a step do not divide into {dp_size} data-parallel"):
                    row_ids(plan, topology, 0)


@pytest.mark.parametrize("schedule", [(1,), (2,), (4,), (4, 2, 1), (1, 8, 2, 16), (16, 1)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_fifty_steps_with_changing_ranks(schedule: tuple[int, ...], length: int) -> None:
    """Every ``length`` steps the number of ranks changes; the list of sample ids does not."""
    trained = [
        sorted(
            i for rank in of_ranks(step, rows=16, dp_size=dp_size, micro_batch_rows=4) for micro in rank for i in micro
        )
        for step, dp_size in enumerate(islice((size for size in cycle(schedule) for _ in range(length)), 50))
    ]
    assert trained == [list(range(16 * step, 16 * step + 16)) for step in range(50)]
