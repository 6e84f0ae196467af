"""Statistics of the routers in a step: balance loss and load of every expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Statistics of the routers since they were last read."""

    aux_loss: float
    """Balance loss, mean over layers and micro-batches, coefficient included."""
    expert_load: list[list[float]]
    """[layer][expert] share of the slots; 1 / E when balanced."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> RoutingStats:
        """Build the statistics from the rows of ``routing_counts``."""
        slots = [max(sum(row[1:]), 1.0) for row in rows]
        return cls(
            aux_loss=sum(row[0] for row in rows) / len(rows),
            expert_load=[[n / total for n in row[1:]] for row, total in zip(rows, slots, strict=True)],
        )


@torch.no_grad()
def routing_counts(chunks: Sequence[Any]) -> Tensor:
    """Return and reset [num_layers, 1 + E] fp64 on the device: each layer's balance loss and slots per expert.

    This takes one reduction over the pipeline and no copy to the host.

    Args:
        chunks: this rank's parts of the model, bare or wrapped for data parallelism.
    """
    from megatron.core import parallel_state

    models = [getattr(chunk, "module", chunk) for chunk in chunks]
    c = models[0].model_config
    device = next(models[0].parameters()).device
    counts = torch.zeros(c.num_layers, 1 + c.num_experts, dtype=torch.float64, device=device)
    for model in models:
        for layer in model.decoder.layers:
            counts[layer.layer_number - 1] = layer.mlp.router.take_stats()
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
    return counts
