"""The reduced gradients of one step: measured layer by layer without a wait for the device, then applied or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.optimizer import Optimizer


class ReadyGradients:
    """Sums over the trained tokens of the global batch; ``apply`` divides by their number and clips, in one pass.

    Build it after the backward passes of a step, on every rank. A step that is not applied leaves nothing behind that the
    next ``begin_step`` does not clear.
    """

    def __init__(self, optimizer: Optimizer, model: TrainableModel) -> None:
        self._optimizer, self._num_layers = optimizer, int(model[0].config.num_layers)
        optimizer.prepare_gradients()
        layer_of = _layers(model)
        self._parts = [(part, _pairs(part, layer_of)) for part in optimizer.parts]

    @torch.no_grad()
    def squares(self) -> Tensor:
        """[num_layers + 1] fp64 on the device, the same on every rank: sum of squares of each decoder layer's gradient, and
        of everything else (embedding, final norm, head). One reduction per process group, no copy to the host.

        What counts is what Megatron counts (``get_grads_for_grad_norm``): no replica of a tensor-parallel parameter,
        no shared one; with the distributed optimizer every rank has its own shard.
        """
        from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
        from megatron.core.transformer.module import param_is_not_shared

        sums: dict[Any, Tensor] = {}
        for part, pairs in self._parts:
            group = part.get_grad_stats_parallel_group()
            groups = {name: getattr(part, name, None) for name in ("tp_group", "expert_tp_group")}
            counted = [
                (layer, main.grad)
                for layer, main in pairs
                if main.grad is not None
                and param_is_not_shared(main)
                and param_is_not_tensor_parallel_duplicate(main, **groups)
            ]
            total = sums.get(group)
            if total is None:
                device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda(part) else torch.device("cpu")
                total = sums[group] = torch.zeros(self._num_layers + 1, dtype=torch.float64, device=device)
            if counted:
                norms = torch.stack(torch._foreach_norm([grad for _, grad in counted])).double()
                index = torch.tensor([layer % (self._num_layers + 1) for layer, _ in counted])
                total.index_add_(0, index.to(total.device, non_blocking=True), norms.to(total.device).square())
        for group, total in sums.items():
            torch.distributed.all_reduce(total, group=group)
        return torch.stack(list(sums.values())).sum(0)

    def apply(self, *, scale: float) -> None:
        """Multiply by ``scale`` (one over the trained tokens, times what clipping leaves) and update the parameters."""
        self._optimizer.apply_gradients(scale=scale)


def _on_cuda(part: Any) -> bool:
    return torch.distributed.get_backend(part.get_grad_stats_parallel_group()) == "nccl"


def _layers(model: TrainableModel) -> dict[int, int]:
    """Map the ``id`` of each parameter inside a decoder layer to the 0-based layer."""
    return {
        id(param): int(layer.layer_number) - 1
        for chunk in model
        for layer in chunk.module.decoder.layers
        for param in layer.parameters()
    }


def _pairs(part: Any, layer_of: dict[int, int]) -> list[tuple[int, Any]]:
    """Pairs of (layer, the parameter whose gradient the optimizer uses); layer -1 is outside of all layers."""
    return [(layer_of.get(id(model), -1), main) for model, main in _main_parameters(part)]


def _main_parameters(part: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of (model parameter, what the optimizer updates in its place: itself, an fp32 copy, or a shard of either).

    Source: Megatron-Core 0.19.2, ``optimizer.py`` and ``distrib_optimizer.py``, where the groups are parallel lists.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    if part.optimizer is None:  # this rank has no parameter of the kind
        return
    if isinstance(part, DistributedOptimizer):
        pairs = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            (part.float16_groups, part.fp32_from_float16_groups),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
        ]
    else:
        own = [group["params"] for group in part.optimizer.param_groups]
        pairs = [(own, own)]
    for models, mains in pairs:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)
