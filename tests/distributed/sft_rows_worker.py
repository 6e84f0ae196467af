"""One rank that trains on rows of conversations: packed or each conversation alone, in any split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from distributed.parity_worker import MODEL, build, step_of

from m1_data.sampling.loader import batch_rows, collate
from m1_data.sft.choice import Selection
from m1_data.sft.dataset import SFTDataset
from m1_data.sft.store import SampleStore
from m1_stages.config import ParallelConfig
from m1_stages.runtime import device, parallel
from m1_stages.runtime.collectives import barrier


def train(job: dict[str, Any]) -> dict[str, Any]:
    """``store`` (its folder), ``seq_len``, ``parallel``, ``steps``; ``micro_batch`` rows at a time, else all; ``alone``:
    a row for each conversation. The balance loss, which is taken over a micro-batch, is off."""
    torch.set_num_threads(1)
    dev = device.use("cpu")
    sizes = ParallelConfig(**job["parallel"])
    topology = parallel.start(sizes, device=dev, seed=1)
    try:
        shape = dataclasses.replace(MODEL, vocab_size=264, aux_loss_coef=0.0)
        _, chunks, optimizer = build(sizes, seed=5, shape=shape)
        data = SFTDataset(SampleStore(Path(job["store"])), Selection(seq_len=job["seq_len"], seed=1))
        units = [[n] for r in range(len(data)) for n in data.numbers(r)] if job.get("alone") else None
        count = len(units) if units else len(data)
        found: dict[str, Any] = {"losses": [], "grad_norms": [], "trained_tokens": []}
        for _ in range(job["steps"]):
            parts = batch_rows(0, global_batch=count, dp_rank=topology.dp_rank, dp_size=topology.dp_size,
                               micro_batch=job.get("micro_batch", count // topology.dp_size))  # fmt: skip
            batches = []
            for ids in parts:
                rows = [[data.segment(n) for n in units[i]] if units else data.row(i) for i in ids]
                whole = collate(rows, ids, seq_len=job["seq_len"], pad_id=data.pad_id)
                batches.append(whole.zigzag(topology.cp_rank, topology.cp_size))
            result = step_of(chunks, optimizer, batches)
            found["losses"].append(result.loss)
            found["grad_norms"].append(result.grad_norm)
            found["trained_tokens"].append(result.trained_tokens)
        found |= {"rows": count, "samples": len(data.store.samples), "world": topology.world_size}
        barrier()
    finally:
        parallel.stop()
    return found
