"""One process has nobody to exchange checkpoint plans with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_collectives(world_size: int) -> Iterator[None]:
    """Switch the collectives of saving a distributed checkpoint off in a run of one process; loading has none for its plans.

    They are not only useless there: gloo's worker threads copy the plans, each starts an OpenMP pool of its own, and from
    then on libgomp sees more threads than cores and lets every parallel operation sleep and wake. Measured on 2 cores:
    training steps after the first save took 1.7 times as long.
    """
    if world_size > 1:
        yield
        return
    from megatron.core.dist_checkpointing.strategies import state_dict_saver

    original = state_dict_saver._DistWrapper

    def local(group: Any, use_dist: bool, coordinator_rank: int) -> Any:
        return original(group, False, coordinator_rank)

    state_dict_saver._DistWrapper = local
    try:
        yield
    finally:
        state_dict_saver._DistWrapper = original
