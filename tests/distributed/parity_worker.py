"""One rank of a parity run: trains the tiny hybrid for some steps and writes what it saw.

Usage: python parity_worker.py OUT.json '{"parallel": {...}, "steps": 20, "mutation": ""}' with RANK and WORLD_SIZE set.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from m1_data.loader import PackedBatch, batch_rows
from m1_stages.config import ModelConfig, OptimConfig, ParallelConfig
from m1_stages.decay import released_slopes
from m1_stages.engine import device, parallel

SEQ_LEN, ROWS, VOCAB = 64, 4, 250
MODEL = ModelConfig(
    hidden_size=32, num_layers=8, num_heads=4, head_dim=8, num_kv_heads=2, rotary_dim=8, num_experts=4,
    expert_hidden_size=48, vocab_size=VOCAB, init_std=0.12, aux_loss_coef=0.02,
)  # fmt: skip
DOCS = ((64,), (1, 20, 43), (31, 33), (10, 5, 49))


def packed(row_ids: list[int]) -> PackedBatch:
    """Rows of several documents each, the same four for every step: the model memorises them."""
    tokens, masks, lengths = [], [], []
    for row in row_ids:
        generator = torch.Generator().manual_seed(row % ROWS)
        tokens.append(torch.randint(0, VOCAB, (SEQ_LEN,), generator=generator))
        mask = torch.ones(SEQ_LEN)
        lengths += DOCS[row % ROWS]
        mask[torch.tensor(DOCS[row % ROWS]).cumsum(0) - 1] = 0.0
        masks.append(mask)
    flat = torch.cat(tokens)
    loss_mask = torch.cat(masks)
    return PackedBatch(
        tokens=flat[None],
        labels=flat.roll(-1)[None],
        loss_mask=loss_mask[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        doc_lengths=tuple(lengths),
        sample_ids=tuple(row_ids),
        trained_tokens=int(loss_mask.sum()),
    )


def main(out: str, job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dev = device.use("cpu")
    sizes = ParallelConfig(**job["parallel"])
    topology = parallel.start(sizes, device=dev, seed=1)
    from m1_stages.engine.optimizer import build_optimizer, set_learning_rate
    from m1_stages.engine.step import train_step, wrap_ddp
    from m1_stages.model import build_model

    model = build_model(MODEL, parallel=sizes, rope_base=1e4, seed=5, recompute=job.get("recompute", False))[0]
    slopes = released_slopes(MODEL.num_layers, MODEL.num_heads)
    _mutate_before(job.get("mutation", ""), model)
    chunks = wrap_ddp([model], distributed_optimizer=sizes.distributed_optimizer)
    optim = dataclasses.replace(OptimConfig(), eps=1e-8)
    optimizer = build_optimizer(chunks, optim, bf16=False, distributed=sizes.distributed_optimizer)
    record: dict[str, Any] = {"losses": [], "grad_norms": [], "aux": [], "layer_norms": [], "load": []}
    for step in range(job["steps"]):
        model.set_slopes(_mutated_slopes(job.get("mutation", ""), slopes, topology.rank))
        set_learning_rate(optimizer, 3e-3)
        rows = batch_rows(
            step,
            global_batch=ROWS,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            micro_batch=job.get("micro_batch", ROWS // topology.dp_size),
        )
        result = train_step(chunks, optimizer, [packed(ids).zigzag(topology.cp_rank, topology.cp_size) for ids in rows])
        result.gradients.apply()
        stats = model.routing_stats()
        record["losses"].append(result.loss)
        record["grad_norms"].append(result.gradients.norm)
        record["aux"].append(stats.aux_loss)
        record["layer_norms"].append(result.layer_grad_norms)
        record["load"].append(stats.expert_load)
    if "save" in job:
        from m1_stages.checkpoint.write import save_in_process

        metadata = {"non_homogeneous_layers": True}
        state = model.sharded_state_dict(metadata=metadata)
        save_in_process({"model": state, "optimizer": optimizer.sharded_state_dict(state)}, Path(job["save"]))
    record["local_parameters"] = sum(p.numel() for p in model.parameters())
    record["topology"] = topology.sizes()
    record["hits"] = device.hits()
    if topology.rank == topology.world_size - 1:
        with open(out, "w") as file:
            json.dump(record, file)
    parallel.stop()


def _mutated_slopes(mutation: str, slopes: list[list[float]], rank: int) -> list[list[float]]:
    if mutation == "rank 1 takes rank 0's heads" and rank == 1:
        return [row[2:] + row[:2] for row in slopes]
    if mutation == "slopes of the neighbour layer" and rank == 1:
        return slopes[1:] + slopes[:1]
    return slopes


def _mutate_before(mutation: str, model: torch.nn.Module) -> None:
    from m1_stages.model import norms

    if mutation == "no reduction in the sharded norm, forward":
        norms.reduce_from_tensor_model_parallel_region = lambda x, group: x
    elif mutation == "no reduction in the sharded norm, backward":
        norms.copy_to_tensor_model_parallel_region = lambda x, group: x
    elif mutation == "norm weight not sequence parallel":
        for name, param in model.named_parameters():
            if "attn_norm" in name:
                param.sequence_parallel = False
    elif mutation == "router weight not sequence parallel":
        for name, param in model.named_parameters():
            if "router" in name:
                param.sequence_parallel = False
    elif mutation == "expert gradients in the dense groups":
        for name, param in model.named_parameters():
            if ".experts." in name:
                param.allreduce = True
    elif mutation == "sharded weights not marked":
        for param in model.parameters():
            if getattr(param, "partition_dim", -1) >= 0:
                param.tensor_model_parallel = False
    elif mutation == "experts missing from the gradient norm":
        for name, param in model.named_parameters():
            if ".experts." in name:
                param.tensor_model_parallel = False
    elif mutation and "slopes" not in mutation and "heads" not in mutation:
        raise ValueError(mutation)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
