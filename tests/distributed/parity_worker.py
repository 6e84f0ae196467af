"""One rank of a parity run: trains the tiny hybrid for some steps and says what it saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from support.batches import packed_batch

from m1_data.sampling.loader import PackedBatch, batch_rows
from m1_stages.config import ModelConfig, OptimConfig, ParallelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.decay import released_slopes
from m1_stages.runtime import device, parallel
from m1_stages.runtime.collectives import barrier

SEQ_LEN, ROWS, VOCAB = 64, 4, 250
MODEL = ModelConfig(
    hidden_size=32, num_layers=8, num_heads=4, head_dim=8, num_kv_heads=2, rotary_dim=8, num_experts=4,
    expert_hidden_size=48, vocab_size=VOCAB, init_std=0.12, aux_loss_coef=0.02,
)  # fmt: skip
BUCKET = 8_000
"""Parameters reduced together where that overlaps: several buckets of dense parameters, and of expert parameters."""
DOCS = ((64,), (1, 20, 43), (31, 33), (10, 5, 49))
Span = tuple[int, int, int]
"""Row, first token, end."""


def packed(row_ids: list[int], untrained: Sequence[Span] = ()) -> PackedBatch:
    """Rows of several documents each, the same four for every step: the model memorises them.

    ``untrained``: tokens that carry no loss, besides the last one of each document.
    """
    tokens, masks, lengths = [], [], []
    for row in row_ids:
        generator = torch.Generator().manual_seed(row % ROWS)
        tokens.append(torch.randint(0, VOCAB, (SEQ_LEN,), generator=generator))
        mask = torch.ones(SEQ_LEN)
        lengths += DOCS[row % ROWS]
        mask[torch.tensor(DOCS[row % ROWS]).cumsum(0) - 1] = 0.0
        for of, start, end in untrained:
            if of == row % ROWS:
                mask[start:end] = 0.0
        masks.append(mask)
    return packed_batch(torch.cat(tokens), lengths, loss_mask=torch.cat(masks), sample_ids=row_ids)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """``parallel``, ``steps``, and if need be ``micro_batch`` rows, ``recompute``, ``save``, ``mutation``, ``untrained``,
    ``dropped`` (steps whose gradients are not applied), ``bucket`` (parameters reduced together), ``model`` (what differs
    from ``MODEL``), ``lora`` (targets of adapters, which alone are trained). On the GPU of this rank where one is visible."""
    torch.set_num_threads(1)
    dev = device.use("auto", local_rank=parallel.local_rank())
    from distributed.mutations import Mutation

    mutation = Mutation(job.get("mutation", ""))
    sizes = ParallelConfig(**job["parallel"])
    topology = parallel.start(sizes, device=dev, seed=1)
    try:
        with mutation.applied():
            record = _train(job, sizes, topology, dev, mutation)
        barrier()  # whoever leaves first would cut off what the others still receive
    finally:
        parallel.stop()
    return record | {"mutated": mutation.calls}


def build(
    sizes: ParallelConfig,
    *,
    seed: int,
    recompute: bool = False,
    mutation: Any = None,
    bucket: int = BUCKET,
    shape: ModelConfig = MODEL,
    on: str = "cpu",
    lora: LoraConfig | None = None,
) -> tuple[Any, Any, Any]:
    """Chunks of this rank, the same wrapped, and their optimizer."""
    from m1_stages.model import build_model
    from m1_stages.runtime.ddp import TrainableModel
    from m1_stages.runtime.optimizer import Optimizer

    model = build_model(shape, parallel=sizes, rope_base=1e4, seed=seed, recompute=recompute, device=on, lora=lora)
    if mutation:
        mutation.spoil(model)
    chunks = TrainableModel(model, sizes, bucket_size=bucket)
    optim = dataclasses.replace(OptimConfig(), eps=1e-8)
    return model, chunks, Optimizer(chunks, optim, bf16=False, distributed=sizes.distributed_optimizer)


def step_of(chunks: Any, optimizer: Any, batches: list[PackedBatch], *, apply: bool = True) -> Any:
    """One step at a fixed rate; its gradients are applied, or dropped."""
    from m1_stages.training.objective import NextTokenCrossEntropy
    from m1_stages.training.step import train_step

    for chunk in chunks:
        shape = chunk.module.model_config
        chunk.module.set_slopes(released_slopes(shape.num_layers, shape.num_heads))
    optimizer.set_learning_rate(3e-3)
    result = train_step(chunks, optimizer, batches, NextTokenCrossEntropy())
    if apply:
        result.apply(max_norm=OptimConfig().grad_clip)
    return result


def _train(
    job: dict[str, Any], sizes: ParallelConfig, topology: parallel.Topology, dev: device.Device, mutation: Any
) -> dict[str, Any]:
    options = {"recompute": job.get("recompute", False), "bucket": job.get("bucket", BUCKET), "on": dev.name}
    options["shape"] = dataclasses.replace(MODEL, **job.get("model", {}))
    if "lora" in job:
        options["lora"] = LoraConfig(stage="sft", rank=4, alpha=8.0, targets=tuple(job["lora"]))
    model, chunks, optimizer = build(sizes, seed=5, mutation=mutation, **options)
    frozen = {param: param.detach().clone() for param in model.parameters() if not param.requires_grad}
    keys = "losses", "grad_norms", "aux", "layer_norms", "load", "trained_tokens", "own_trained_tokens"
    record: dict[str, Any] = {key: [] for key in keys}
    for step in range(job["steps"]):
        rows = batch_rows(
            step,
            global_batch=ROWS,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            micro_batch=job.get("micro_batch", ROWS // topology.dp_size),
        )
        whole = [packed(ids, job.get("untrained", ())) for ids in rows]
        batches = [batch.zigzag(topology.cp_rank, topology.cp_size).to(dev.torch_device) for batch in whole]
        result = step_of(chunks, optimizer, batches, apply=step not in job.get("dropped", ()))
        stats = result.routing
        record["losses"].append(result.loss)
        record["grad_norms"].append(result.grad_norm)
        record["aux"].append(stats.aux_loss)
        record["layer_norms"].append(result.layer_grad_norms)
        record["load"].append(stats.expert_load)
        record["trained_tokens"].append(result.trained_tokens)
        record["own_trained_tokens"].append([batch.trained_tokens for batch in batches])
    if "save" in job:
        from m1_stages.checkpoint.snapshot import save_in_process

        metadata = {"non_homogeneous_layers": True}
        state = model.sharded_state_dict(metadata=metadata)
        save_in_process({"model": state, "optimizer": optimizer.sharded_state_dict(state)}, Path(job["save"]))
    record["buckets"] = [[len(c.bucket_groups), len(c.expert_parallel_bucket_groups)] for c in chunks]
    chunks.gather_parameters()
    record["weights"] = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    record["layers"] = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in model]
    record["frozen"] = [len(frozen), all(torch.equal(param, value) for param, value in frozen.items())]
    record["local_parameters"] = sum(p.numel() for p in model.parameters())
    record["longest_crossing"] = _longest_crossing(whole[0], topology.cp_size)
    record["topology"] = topology.sizes() | {"rank": topology.rank}
    record["hits"], record["backend"] = device.hits(), torch.distributed.get_backend()
    return record


def _longest_crossing(batch: PackedBatch, ranks: int) -> int:
    """Edges between context-parallel shards that lie inside one document, of the document with the most."""
    if ranks == 1:
        return 0
    shard = batch.tokens.shape[1] // (2 * ranks)
    edges = batch.cu_seqlens.tolist()
    return max((end - 1) // shard - start // shard for start, end in pairwise(edges))
