"""The ranks that generate together, and how many such groups share the prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m1_stages.config import ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A group of ranks that hold one model and the same tokens."""

    index: int
    count: int
    """Number of replicas; each generates a share of the prompts."""
    is_first: bool
    """Whether this is the first rank of its replica, which has the results to report."""
    first_rank: int
    group: dist.ProcessGroup | None
    """The ranks of the replica; None for a single one."""

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Replica:
        """Find this rank's replica; collective, after the process group and Megatron's groups have started.

        Megatron numbers tensor-parallel ranks first and expert-parallel ranks first, so ranks that share an expert or a head are
        neighbours.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        size = math.lcm(parallel.tensor, parallel.expert * parallel.expert_tensor)
        groups = [list(range(first, first + size)) for first in range(0, world, size)]
        made: list[Any] = [dist.new_group(ranks) if size > 1 else None for ranks in groups]
        index = rank // size
        return cls(
            index=index, count=len(groups), is_first=rank % size == 0, first_rank=index * size, group=made[index]
        )

    def agree(self, tokens: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first rank's values: rounding that differs must not part the ranks of a replica."""
        if self.group is None:
            return tokens, logprobs
        both = torch.stack([tokens.double(), logprobs.double()])
        dist.broadcast(both, src=self.first_rank, group=self.group)
        return both[0].to(tokens.dtype), both[1].to(logprobs.dtype)


def generation_layout(parallel: ParallelConfig) -> ParallelConfig:
    """Return the layout in which a model that was trained in ``parallel`` generates.

    Tensor and expert parallelism stay. Pipeline and context parallelism become 1: a checkpoint can be loaded in any layout.
    Further processes are replicas.
    """
    return replace(parallel, pipeline=1, virtual_pipeline=1, pipeline_layers=(), context=1, dispatcher="allgather")


def device_copy(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy host values to the device without waiting for what is queued there."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()
