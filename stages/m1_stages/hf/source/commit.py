"""Streams the tensors of a source into a committed checkpoint of this project, one part of a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.config import ParallelConfig
from m1_stages.errors import CheckpointError, M1Error
from m1_stages.hf.source.tensors import SourceTensors
from m1_stages.hf.tensor_names import is_experts, our_shapes

FILE_BYTES = 4 << 30
"""Bytes of a file of the checkpoint, about: ranks share the files when they verify a checkpoint."""


def commit_source(
    store: CheckpointStore,
    tensors: SourceTensors,
    meta: CheckpointMeta,
    train_state: dict[str, Any],
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> Path:
    """Write a checkpoint with the weights of ``tensors`` and no optimizer state, and commit it.

    Names, shapes and sharding are those of the model itself, built without memory. Experts are written one by one, so no more
    than one matrix of the source and a copy of it are in memory besides the file that is mapped. Any parallel layout loads it.

    The function starts and leaves a process group of its own; there must be none before.

    Args:
        on_read: called with the bytes of every part that was read.

    Raises:
        CheckpointError: the source cannot be read, has values that are not finite, or the checkpoint cannot be written.
    """
    from m1_stages.runtime import device, parallel

    dtypes = tensors.dtypes()
    failures: list[M1Error] = []

    def read(key: str, offset: tuple[int, ...]) -> Tensor:
        try:
            part = tensors.read(key, dtypes[key], offset[0] if is_experts(key) else None)
        except M1Error as error:
            failures.append(error)
            raise
        on_read(part.nbytes)
        return part

    parallel.start(ParallelConfig(), device=device.use("cpu"), seed=0)
    try:
        state = {"model": _planned(tensors, dtypes), "train_state": train_state}
        num_bytes = sum(dtypes[k].itemsize * torch.Size(s).numel() for k, s in our_shapes(tensors.model).items())
        return store.save(state, meta, read=read, files=-(-num_bytes // FILE_BYTES))
    except CheckpointError as error:
        raise (failures or [error])[0] from None  # the store knows only that writing failed, not that reading did
    finally:
        parallel.stop()


def _planned(tensors: SourceTensors, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """The model's sharded state dict on the meta device, in the source's dtypes and with experts one by one."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from m1_stages.model import build_model

    built = build_model(tensors.model, parallel=ParallelConfig(), rope_base=1e4, device="meta")
    state = built.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    found = set()
    for chunk in state.values():
        for name, entry in chunk.items():
            if not isinstance(entry, ShardedTensor):
                continue
            found.add(entry.key)
            data = torch.empty(entry.global_shape, dtype=dtypes[entry.key], device="meta")
            if is_experts(entry.key):
                count = len(data)
                parts = [ShardedTensor.from_rank_offsets(entry.key, data[:1], (0, e, count)) for e in range(count)]
                chunk[name] = dict(enumerate(parts))
            else:
                chunk[name] = ShardedTensor.from_rank_offsets(entry.key, data)
    assert found == dtypes.keys(), found ^ dtypes.keys()
    return state
