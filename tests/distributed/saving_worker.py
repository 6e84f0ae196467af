"""What goes wrong silently, or never ends, when Megatron-Core saves and loads: each in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parity_worker import ROWS, build, packed, step_of

from m1_stages.config import ParallelConfig
from m1_stages.engine import device, parallel

SHARDING = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@contextmanager
def alone(sizes: ParallelConfig) -> Iterator[None]:
    torch.set_num_threads(1)
    parallel.start(sizes, device=device.use("cpu"), seed=1)
    try:
        yield
    finally:
        parallel.stop()


def state_of(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=SHARDING)
    state = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=SHARDING)
    return {"model": weights, "optimizer": state}


def resume(job: dict[str, Any]) -> dict[str, Any]:
    """Losses after a save with the distributed optimizer: of the run that went on, and of one that loaded it."""
    sizes = ParallelConfig(distributed_optimizer=True)
    with alone(sizes):
        from megatron.core import dist_checkpointing
        from mutations import Mutation

        from m1_stages.checkpoint.write import save_in_process
        from m1_stages.engine import optimizer as product

        batches = [packed(list(range(ROWS)))]
        mutation = Mutation(job["mutation"])
        model, chunks, optimizer = build(sizes, seed=5)
        for _ in range(3):
            step_of(chunks, optimizer, batches)
        save_in_process(state_of(model, optimizer, is_loading=False), Path(job["folder"]))
        went_on = [step_of(chunks, optimizer, batches).loss for _ in range(4)]

        model, chunks, optimizer = build(sizes, seed=6)
        product.make_loadable(optimizer)
        loaded = dist_checkpointing.load(state_of(model, optimizer, is_loading=True), job["folder"])
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        with mutation.applied():
            product.finish_loading(optimizer)
        came_back = [step_of(chunks, optimizer, batches).loss for _ in range(4)]
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        counters = {float(state["step"]) for part in parts for state in part.optimizer.state.values()}
        return {"went_on": went_on, "came_back": came_back, "counters": sorted(counters), "mutated": mutation.calls}


def save_without_psutil(job: dict[str, Any]) -> list[str]:
    """The files of a checkpoint that was saved where psutil does not import."""
    sizes = ParallelConfig()
    with alone(sizes):
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from m1_stages.checkpoint.write import save_in_process

        model, _, optimizer = build(sizes, seed=5)
        with mock.patch.object(filesystem_async, "HAVE_PSUTIL", False):
            save_in_process(state_of(model, optimizer, is_loading=False), Path(job["folder"]))
        return sorted(path.name for path in Path(job["folder"]).iterdir())
