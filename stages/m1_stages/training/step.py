"""One optimizer step: forward and backward over the micro-batches, reduced gradients, and what was measured.

Gradients and losses are per trained token: every rank sums over its tokens, sums are reduced over the data-parallel
ranks and divided by the number of trained tokens of the whole global batch, so the result does not depend on how the
batch is cut into micro-batches or ranks. (The balance loss is defined over the rows processed together, so it alone depends
on the grouping.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from m1_data.sampling.loader import PackedBatch
from m1_stages.model.routing import RoutingStats, routing_counts
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.gradients import ReadyGradients
from m1_stages.runtime.optimizer import Optimizer
from m1_stages.training.objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The measurements of one step, the same on every rank."""

    loss: float
    """Mean over the trained tokens of the global batch, nats; inf when it is not finite."""
    trained_tokens: int
    grad_norm: float
    """L2 norm of the whole gradient before clipping; inf when it is not finite."""
    layer_grad_norms: list[float]
    """Gradient norm of each decoder layer."""
    metrics: dict[str, float]
    """The objective's own sums, per trained token of the global batch."""
    gradients: ReadyGradients
    routing: RoutingStats
    rank_seconds: list[float]
    """Seconds of each rank's own work: reading rows before the forward pass, and on a GPU the attention of its layers."""
    bad_ranks: list[int]
    """Ranks on which the loss of a micro-batch was not finite."""
    bad_micro_batches: dict[int, int]
    """Data-parallel rank to its first such micro-batch."""
    stop_requested: bool
    """Whether any rank was asked to stop."""

    @property
    def finite(self) -> bool:
        """Whether an update from these gradients would be finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def apply(self, *, max_norm: float) -> None:
        """Update the parameters with the mean gradient, clipped to ``max_norm`` (0: not clipped)."""
        clip = min(1.0, max_norm / (self.grad_norm + 1e-6)) if max_norm > 0.0 else 1.0
        self.gradients.apply(scale=clip / max(self.trained_tokens, 1))


def train_step(
    model: TrainableModel,
    optimizer: Optimizer,
    micro_batches: Sequence[PackedBatch],
    objective: Objective,
    *,
    stop: Callable[[], bool] = lambda: False,
    began: float | None = None,
) -> StepResult:
    """Run forward and backward and measure; the caller decides whether to ``apply`` the result.

    The host waits for the device once, when everything measured comes back in one copy.

    Args:
        model: this rank's chunks of the model.
        optimizer: the optimizer of its parameters.
        micro_batches: this data-parallel rank's share of the global batch, each ``[1, T]``, all of equal ``T``, cut for
            this context-parallel rank.
        objective: what is minimised.
        stop: whether this rank was asked to stop; asked once, after the backward pass.
        began: ``time.perf_counter()`` when this rank began the step, if before this call.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    began = time.perf_counter() if began is None else began
    seconds = time.perf_counter() - began + model.layer_timer.seconds()
    model.zero_grad_buffers()
    optimizer.begin_step()
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, objective),
        data_iterator=[iter(micro_batches) for _ in model] if len(model) > 1 else iter(micro_batches),
        model=model.chunks if len(model) > 1 else model[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1] * micro_batches[0].shard[1],
        micro_batch_size=1,
        forward_only=False,
    )
    gradients = ReadyGradients(optimizer, model)
    return _measured(
        model, gradients, outputs, objective.metrics, micro_batches=len(micro_batches), seconds=seconds, stop=stop()
    )


@torch.no_grad()
def _measured(
    model: TrainableModel,
    gradients: ReadyGradients,
    outputs: list[Tensor],
    metrics: Sequence[str],
    *,
    micro_batches: int,
    seconds: float,
    stop: bool,
) -> StepResult:
    from megatron.core import parallel_state as mpu

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    dp, dp_rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    squares = gradients.squares()
    routing = routing_counts(model)
    device = squares.device
    per_micro_batch = (
        torch.stack(outputs) if outputs else torch.zeros(1, 2 + len(metrics), dtype=torch.float64, device=device)
    )
    total = per_micro_batch.sum(0)
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        group = mpu.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(total, src=mpu.get_pipeline_model_parallel_last_rank(), group=group)
    bad = ~per_micro_batch[:, 0].isfinite()
    # The earlier the larger: context-parallel ranks share a slot, and the largest number is kept.
    first_bad = torch.where(bad.any(), float(len(bad)) - bad.double().argmax(), 0.0).double()
    own = torch.zeros(2 * world + dp + 1, dtype=torch.float64)
    own[rank], own[-1] = seconds, float(stop)
    own = own.to(device, non_blocking=True)
    own[world + rank] = first_bad
    own[2 * world + dp_rank] = first_bad
    values = torch.cat([total, squares, routing.view(-1), own]).nan_to_num(nan=math.inf, posinf=math.inf)
    if world > 1:  # equal numbers on all ranks, to the last bit, give equal decisions
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    numbers = values.tolist()
    sizes = [2, len(metrics), len(squares), routing.numel(), world, world, dp, 1]
    parts = [numbers[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    (loss_sum, tokens), own_sums, squares_list, routed, rank_seconds, bad_ranks, bad_dp, (stopped,) = parts
    layers, width = routing.shape
    return StepResult(
        loss=loss_sum / max(tokens, 1.0),
        trained_tokens=int(tokens),
        grad_norm=math.sqrt(sum(squares_list)) / max(tokens, 1.0),
        layer_grad_norms=[math.sqrt(square) / max(tokens, 1.0) for square in squares_list[:-1]],
        metrics={name: value / max(tokens, 1.0) for name, value in zip(metrics, own_sums, strict=True)},
        gradients=gradients,
        routing=RoutingStats.of([routed[i * width : (i + 1) * width] for i in range(layers)]),
        rank_seconds=rank_seconds,
        bad_ranks=[r for r, value in enumerate(bad_ranks) if value],
        bad_micro_batches={r: micro_batches - int(value) for r, value in enumerate(bad_dp) if value},
        stop_requested=bool(stopped),
    )


def _forward_step(objective: Objective, batches: Iterator[PackedBatch], model: nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return objective.forward(model, batch), partial(objective.loss, batch)
