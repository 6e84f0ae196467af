"""The frozen checkpoint of four ranks, TP2 EP2 PP2 in bf16: what is in it, how it was written, and a rank that reads it.

Megatron-Core 0.16.1 wrote it: ``run_on_ranks(4, "support.frozen_sharded:write", {"folder": ...})``. Its file is kept, and must
always load. Every weight, fp32 master and moment holds values that its global name determines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from m1_stages.checkpoint import CheckpointStore
from m1_stages.config.load import load_config
from m1_stages.runtime import device
from m1_stages.training.run import Run
from m1_stages.training.session import open_session, with_vocab
from m1_stages.training.train_state import TrainState

SIZES = {"tensor": 2, "pipeline": 2, "expert": 2}
CONFIG = """
preset = "tiny"
[model]
hidden_size = 16
num_layers = 2
softmax_every = 2
num_heads = 2
head_dim = 8
rotary_dim = 8
num_kv_heads = 2
num_experts = 2
expert_hidden_size = 16
[run]
device = "cpu"
threads = 1
precision = "bf16"
"""
POSITION = TrainState(
    stage="32k", stage_step=7, global_step=7, tokens_seen=7168, slopes=[[0.5, 0.25], [0.125, 0.0625]],
    data_fingerprint="frozen", ramp_progress=0.75, first_loss=4.5,
)  # fmt: skip


def write(job: dict[str, Any]) -> None:
    """Save, from one of four ranks, below ``folder``."""
    with _session(Path(job["folder"]), SIZES) as run:
        for name, tensor, values in _tensors(run):
            tensor.copy_(values.view(tensor.shape))
            assert torch.equal(tensor, values.view(tensor.shape)), f"{name} does not hold such numbers exactly"
        for state in _adam(run):
            state["step"] = torch.tensor(7.0)
        run.checkpointer.save_now(POSITION)


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Load ``checkpoints`` in the layout ``parallel``; names of the tensors this rank has, and of those that differ."""
    with _session(Path(job["folder"]), job["parallel"]) as run:
        found = run.checkpointer.restore(CheckpointStore(Path(job["checkpoints"])).committed())
        assert found is not None
        names, wrong = [], []
        for name, tensor, values in _tensors(run):
            names.append(name)
            if not torch.equal(tensor, values.view(tensor.shape)):
                wrong.append(name)
        steps = sorted({float(state["step"]) for state in _adam(run)})
    return {"names": names, "wrong": wrong, "steps": steps, "position": found[1] == POSITION}


@contextmanager
def _session(folder: Path, sizes: dict[str, int]) -> Iterator[Run]:
    torch.set_num_threads(1)
    device.use("cpu")
    config = folder / f"m1-{os.getpid()}.toml"  # each rank its own: another one's may be half written
    config.write_text(CONFIG)
    keys = [f"run.dir={folder / 'run'}", *(f"parallel.{axis}={size}" for axis, size in sizes.items())]
    with open_session(with_vocab(load_config(config, keys), 100), [], rope_base=1e4, fresh=False) as run:
        yield run


def _tensors(run: Run) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Global name, this rank's part of the tensor, and what it has to hold."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    metadata = {"non_homogeneous_layers": True}
    weights = run.model.sharded_state_dict(metadata=metadata)
    fresh = not _adam(run)[0]
    moments = run.optimizer.sharded_state_dict(weights, is_loading=fresh, metadata=metadata)
    for part in (weights, moments):
        for tensor in nested_values(part):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                yield tensor.key, tensor.data.detach(), _expected(tensor)


def _expected(tensor: Any) -> torch.Tensor:
    """Small numbers that bf16 holds exactly, another sequence for each name: this rank's part of them."""
    start = int.from_bytes(hashlib.sha256(tensor.key.encode()).digest()[:2], "big")
    shape = tuple(tensor.global_shape)
    whole = (torch.arange(torch.Size(shape).numel()) * 7 + start) % 251 / 256
    return whole.to(tensor.dtype).reshape(shape)[tensor.global_slice()]


def _adam(run: Run) -> list[dict[str, Any]]:
    """State of every parameter that this rank's optimizer updates; empty before it has one."""
    return [
        part.optimizer.state.get(parameter, {})
        for part in run.optimizer.parts
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
