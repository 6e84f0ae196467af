"""What goes wrong silently, or never ends, when Megatron-Core saves and loads: each in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distributed.parity_worker import ROWS, build, packed, step_of

from m1_stages.config import ParallelConfig
from m1_stages.runtime import device, parallel

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
        from distributed.mutations import Mutation
        from megatron.core import dist_checkpointing

        from m1_stages.checkpoint.snapshot import save_in_process

        batches = [packed(list(range(ROWS)))]
        mutation = Mutation(job["mutation"])
        model, chunks, optimizer = build(sizes, seed=5)
        for _ in range(3):
            step_of(chunks, optimizer, batches)
        save_in_process(state_of(model, optimizer, is_loading=False), Path(job["folder"]))
        went_on = [step_of(chunks, optimizer, batches).loss for _ in range(4)]

        model, chunks, optimizer = build(sizes, seed=6)
        with mutation.applied(), optimizer.loading():
            loaded = dist_checkpointing.load(state_of(model, optimizer, is_loading=True), job["folder"])
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
        came_back = [step_of(chunks, optimizer, batches).loss for _ in range(4)]
        parts = optimizer.parts
        counters = {float(state["step"]) for part in parts for state in part.optimizer.state.values()}
        return {"went_on": went_on, "came_back": came_back, "counters": sorted(counters), "mutated": mutation.calls}


def save_without_psutil(job: dict[str, Any]) -> list[str]:
    """The files of a checkpoint that was saved where psutil does not import."""
    sizes = ParallelConfig()
    with alone(sizes):
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from m1_stages.checkpoint.snapshot import save_in_process

        model, _, optimizer = build(sizes, seed=5)
        with mock.patch.object(filesystem_async, "HAVE_PSUTIL", False):
            save_in_process(state_of(model, optimizer, is_loading=False), Path(job["folder"]))
        return sorted(path.name for path in Path(job["folder"]).iterdir())


def one_part_refused(job: dict[str, Any]) -> dict[str, Any]:
    """Which of two checkpoints a rank loads when the newer one has a planted object that only rank 1 reads."""
    from support.planted import Evil, plant_object, torch_saved
    from support.tiny_checkpoint import meta, rehash

    from m1_stages.checkpoint import CheckpointStore
    from m1_stages.runtime.collectives import barrier

    torch.set_num_threads(1)
    topology = parallel.start(ParallelConfig(), device=device.use("cpu"), seed=1)
    try:
        from megatron.core.dist_checkpointing import ShardedObject

        def state(value: int) -> dict[str, Any]:
            return {"mine": ShardedObject(f"of rank {topology.rank}", value, (1,), (0,))}

        store, proof = CheckpointStore(Path(job["folder"])), Path(job["folder"]) / "proof"
        for step in (1, 2):
            newest = store.save(state(step), meta(step))
        if topology.rank == 1:
            plant_object(newest / "__1_0.distcp", "of rank 1", torch_saved(Evil(proof), proof))
            rehash(newest)
        barrier()
        found = store.load_first_verified(store.committed(), lambda _: state(0))
        assert found is not None
        return {"step": found[0].meta.global_step, "mine": found[1]["mine"], "ran": proof.exists()}
    finally:
        parallel.stop()


def background_saves(job: dict[str, Any]) -> list[Any]:
    """What a rank sees of background saves when rank 1 is slow, then fails, then is stuck."""
    import builtins
    import threading
    import time

    from m1_stages.checkpoint import CheckpointMeta, CheckpointStore, files
    from m1_stages.errors import CheckpointError

    torch.set_num_threads(1)
    topology = parallel.start(ParallelConfig(), device=device.use("cpu"), seed=1)
    from megatron.core.dist_checkpointing import ShardedTensor

    go, fails = threading.Event(), threading.Event()

    def slow_open(*args: Any) -> Any:
        assert go.wait(60)
        if fails.is_set():
            raise OSError(28, "No space left on device", args[0])
        return builtins.open(*args)

    if topology.rank == 1:
        files.open = slow_open  # type: ignore[attr-defined]
    stuck: list[str] = []
    store = CheckpointStore(Path(job["folder"]), deadline_s=1.0, on_stuck=stuck.append)

    def begin(step: int) -> torch.Tensor:
        mine = torch.full((4,), float(10 * step + topology.rank))
        weights = {"w": ShardedTensor.from_rank_offsets("w", mine, (0, topology.rank, topology.world_size))}
        meta = CheckpointMeta(
            stage="32k", stage_step=step, global_step=step, stage_final=False, config_sha256="", data_fingerprint="",
            topology={}, decay={},
        )  # fmt: skip
        store.begin({"model": weights}, meta)
        return mine

    def outcome() -> str:
        try:
            path = store.poll(wait=True)
            return path.name if path else ""
        except CheckpointError as error:
            return f"{error.what}, {error.where.split(', ')[-1]}"

    try:
        seen: list[Any] = []
        mine = begin(1)
        mine.zero_()  # training goes on
        time.sleep(0.2)  # rank 0 has written by now
        seen.append(store.poll())
        go.set()
        seen.append(outcome())
        fails.set()
        begin(2)
        seen.append(outcome())
        fails.clear()
        go.clear()
        begin(3)
        seen += [outcome(), len(stuck)]
        try:
            begin(4)
        except CheckpointError as error:
            seen.append(error.what)
        go.set()
        for writer in store._abandoned:
            writer._thread.join(60)
        begin(5)
        seen.append(outcome())
        loaded = {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(8))} if topology.rank == 0 else {}
        found = store.load_first_verified(store.committed()[1:], lambda _: {"model": loaded})
        assert found is not None
        if topology.rank == 0:
            seen += [found[0].path.name, found[1]["model"]["w"].tolist()]
        return seen
    finally:
        if topology.rank == 1:
            del files.open  # type: ignore[attr-defined]
        parallel.stop()


def replicas(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes that each rank wrote of eight tensors that both hold, and what is loaded of them."""
    from m1_stages.checkpoint import CheckpointMeta, CheckpointStore

    topology = parallel.start(ParallelConfig(), device=device.use("cpu"), seed=1)
    from megatron.core.dist_checkpointing import ShardedTensor

    def state(value: float) -> dict[str, Any]:
        return {
            "model": {
                f"t{n}": ShardedTensor.from_rank_offsets(
                    f"t{n}", torch.full((1000,), value * n), replica_id=topology.rank
                )
                for n in range(8)
            }
        }

    meta = CheckpointMeta(
        stage="32k", stage_step=1, global_step=1, stage_final=False, config_sha256="", data_fingerprint="", topology={}, decay={}
    )  # fmt: skip
    try:
        store = CheckpointStore(Path(job["folder"]))
        path = store.save(state(1.0), meta)
        written = {name: size for name, (size, _) in store.committed()[0].files.items() if name.endswith(".distcp")}
        found = store.load_first_verified(store.committed(), lambda _: state(0.0))
        assert found is not None
        values = [found[1]["model"][f"t{n}"].unique().tolist() for n in range(8)]
        return {"path": path.name, "written": written, "values": values}
    finally:
        parallel.stop()
