"""Checkpoints of a few kilobytes for tests of the checkpoint package, in a process group of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from m1_stages.checkpoint import CheckpointMeta, CheckpointStore
from m1_stages.checkpoint.files import sha256_of
from m1_stages.checkpoint.manifest import MANIFEST, manifest_text, read_manifest


def state(value: float) -> dict[str, Any]:
    """Three tensors and an object in the shard, and plain values, all of which say ``value``."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    weights: dict[str, Any] = {
        f"layer{n}": ShardedTensor.from_rank_offsets(f"layer{n}", torch.full((40, 30), value + n), replica_id=0)
        for n in range(3)
    }
    weights["extra"] = ShardedObject("extra", {"value": value}, (1,), (0,))
    return {"model": weights, "train_state": {"value": value}}


def meta(step: int, *, stage: str = "32k", final: bool = False) -> CheckpointMeta:
    return CheckpointMeta(
        stage=stage, stage_step=step, global_step=step, stage_final=final, config_sha256="c", data_fingerprint="d",
        topology={"world": 1}, decay={"policy": "fixed", "slopes": [[0.5]]},
    )  # fmt: skip


def save(store: CheckpointStore, step: int, *, final: bool = False) -> Path:
    return store.save(state(float(step)), meta(step, final=final))


def load(store: CheckpointStore) -> int | None:
    """The step that is loaded, after every value of it was compared; None when there never was a checkpoint."""
    found = store.load_first_verified(store.committed(), lambda _: state(-1.0))
    if found is None:
        return None
    committed, loaded = found
    step = committed.meta.global_step
    for n in range(3):
        assert torch.equal(loaded["model"][f"layer{n}"], torch.full((40, 30), float(step + n)))
    assert loaded["model"]["extra"] == {"value": float(step)}
    assert loaded["train_state"] == {"value": float(step)}
    return step


def rehash(checkpoint: Path, planted: str = "") -> None:
    """Make the manifest agree with the files again, a ``planted`` one too: whoever plants a file can also write a manifest."""
    committed = read_manifest(checkpoint)
    names = {*committed.files, planted} if (checkpoint / planted).is_file() else committed.files
    files = {name: ((checkpoint / name).stat().st_size, sha256_of(checkpoint / name)) for name in names}
    (checkpoint / MANIFEST).write_text(manifest_text(committed.meta, files))


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint by global key, read without Megatron; plain values (step, decay rates) are at "common"."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    nested: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint)
    _load_state_dict(nested, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    (nested["common"],) = nested.pop("common_state/shard_0_1")
    return nested


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and both Adam moments among them."""
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else ():
            walk(f"{prefix}.{key}", item)
        if isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", contents_of(checkpoint))
    return flat
