"""One rank of ``m1 pretrain`` runs that are stopped and continued with other numbers of processes.

Every step leaves a line of what was really given to the model, not of what was planned:
rows by sample id with a hash of their tokens, labels, mask and positions, and the decay rates of every layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from m1_data.sampling.loader import PackedBatch
from m1_stages.checkpoint import CheckpointStore
from m1_stages.config.load import load_config
from m1_stages.curriculum import stages_of
from m1_stages.errors import Preempted
from m1_stages.jobs import pretrain
from m1_stages.runtime import device
from m1_stages.training import loop
from m1_stages.training.step import train_step


def work(job: dict[str, Any]) -> None:
    """Train the job's stages; SIGTERM to rank 0 alone ends it after ``stop_at``."""
    torch.set_num_threads(1)
    device.use("cpu")
    folder = Path(job["folder"])
    seen = folder / f"{job['name']}-{job['part']}-{os.environ['RANK']}.jsonl"

    latest = CheckpointStore(folder / job["name"] / "checkpoints").latest()
    steps = count(latest.meta.global_step if latest else 0)

    def recorded(chunks: Any, optimizer: Any, batches: list[PackedBatch], objective: Any, **how: Any) -> Any:
        layers = chunks[0].module.decoder.layers
        decay = [getattr(layer.self_attention, "log_decay", None) for layer in layers]
        line = {
            "rows": [rows(batch) for batch in batches],
            "decay": [values if values is None else (-values).tolist() for values in decay],
        }
        with seen.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if next(steps) == job["stop_at"] and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(chunks, optimizer, batches, objective, **how)

    overrides = [*job["set"], f"run.dir={folder / job['name']}"]
    stages = [stage for name in job["stages"] for stage in stages_of(name)]
    with mock.patch.object(loop, "train_step", recorded), suppress(Preempted):
        pretrain.run(load_config(folder / "m1.toml", overrides), stages, [])


def rows(batch: PackedBatch) -> dict[int, str]:
    """SHA-256 of each row of a micro-batch by sample id."""
    parts = [batch.tokens, batch.labels, batch.loss_mask, batch.position_ids]
    cut = [part.view(len(batch.sample_ids), -1) for part in parts]
    return {
        sample: hashlib.sha256(b"".join(part[index].numpy().tobytes() for part in cut)).hexdigest()
        for index, sample in enumerate(batch.sample_ids)
    }
