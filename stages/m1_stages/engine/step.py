"""One optimizer step: forward and backward over the micro-batches, reduced gradients, and what they say.

Gradients and losses are per trained token: every rank sums over its tokens, sums are reduced over the data-parallel
ranks and divided by the number of trained tokens of the whole global batch, so the result does not depend on how the
batch is cut into micro-batches or ranks. (The balance loss is defined over the rows processed together, so it alone depends
on the grouping.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from m1_data.loader import PackedBatch
from m1_stages.engine.optimizer import ReadyGradients

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Same values on every rank, except that only finite gradients are worth applying."""

    loss: float
    """Mean over the trained tokens of the global batch, nats."""
    trained_tokens: int
    gradients: ReadyGradients
    layer_grad_norms: list[float]
    """Per decoder layer, before clipping; empty with the distributed optimizer, which keeps only shards."""


def wrap_ddp(chunks: Sequence[Any], *, distributed_optimizer: bool) -> list[Any]:
    """Wrap in Megatron's DDP (fp32 gradient buffers) and hang the reduction hooks on the model's configuration."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped: list[Any] = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    config = wrapped[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [chunk.no_sync for chunk in wrapped]
    return wrapped


def train_step(chunks: list[Any], optimizer: Any, micro_batches: Sequence[PackedBatch]) -> StepResult:
    """Run forward and backward; the caller decides whether to ``apply`` the returned gradients.

    Args:
        chunks: DDP-wrapped model chunks.
        micro_batches: this data-parallel rank's share of the global batch, each ``[1, T]``, all of equal ``T``, cut for
            this context-parallel rank.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1] * micro_batches[0].shard[1],
        micro_batch_size=1,
        forward_only=False,
    )
    device = micro_batches[0].tokens.device
    total = torch.stack(outputs).sum(0) if outputs else torch.zeros(2, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(total, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    loss_sum, tokens = total.tolist()
    return StepResult(
        loss=loss_sum / max(tokens, 1.0),
        trained_tokens=int(tokens),
        gradients=ReadyGradients(optimizer),
        layer_grad_norms=_layer_grad_norms(chunks),
    )


def _forward_step(batches: Iterator[PackedBatch], model: nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return model(batch), partial(_loss, batch.loss_mask)


def _loss(loss_mask: Tensor, per_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over trained tokens, their number, and both for the log in float64."""
    mask = loss_mask.view(-1)
    loss = (per_token.view(-1) * mask).sum()
    tokens = mask.sum()
    logged = torch.stack([loss.detach().double(), tokens.double()])
    return loss, tokens.to(torch.int), logged


@torch.no_grad()
def _layer_grad_norms(chunks: list[Any]) -> list[float]:
    """L2 norm of each decoder layer's gradient with one reduction and one device-to-host copy."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    if chunks[0].ddp_config.use_distributed_optimizer:
        return []
    num_layers = chunks[0].config.num_layers
    squares: dict[bool, list[list[Tensor]]] = {
        False: [[] for _ in range(num_layers)],
        True: [[] for _ in range(num_layers)],
    }
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            match = _LAYER.search(name)
            if match is None or not (param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)):
                continue
            layer = int(match[1]) + _first_layer(chunk)
            squares[not getattr(param, "allreduce", True)][layer].append(param.main_grad.norm() ** 2)
    device = next(chunks[0].parameters()).device
    total = torch.zeros(num_layers, device=device)
    for is_expert, rows in squares.items():
        part = torch.stack([torch.stack(row).sum() if row else torch.zeros((), device=device) for row in rows])
        group = (
            parallel_state.get_expert_tensor_model_pipeline_parallel_group()
            if is_expert
            else parallel_state.get_model_parallel_group()
        )
        torch.distributed.all_reduce(part, group=group)
        total += part
    return [float(value) for value in total.sqrt().tolist()]


def _first_layer(chunk: Any) -> int:
    """Global index of the chunk's first decoder layer (Megatron numbers layers from 1)."""
    return int(chunk.module.decoder.layers[0].layer_number) - 1
