"""Gives the state of Megatron's distributed optimizer to a checkpoint without a copy of all of it in every process.

Its own way into a checkpoint that any layout can load (``fully_reshardable``) gathers fp32 weights and both moments of all
parameters of a rank in host memory on every rank, before it is known which rank writes what (``get_parameter_state_dp_zero``
in ``megatron/core/optimizer/distrib_optimizer.py``). Here the checkpoint is planned with tensors on the meta device, and then
the shards are gathered in pieces: each rank keeps what it writes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_BYTES = 256 << 20
"""Of all ranks of a data-parallel group together: memory of the device that the gathering takes."""

State = tuple[int, int, str]
"""Number of the part, number of its buffer, and "param" or the name of a moment."""
Pair = tuple[Tensor, Tensor]
"""A tensor, and the memory on the CPU where its values belong."""


class GatheredState:
    """The state of distributed optimizers: planned without values, then gathered; each once.

    Args:
        parts: Megatron's ``DistributedOptimizer`` of dense and of expert parameters.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._planned: dict[State, Tensor] = {}
        """A meta tensor for each, as large as the buffer without its padding."""

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Surround making a sharded state dict: its tensors of the optimizer's state are views of meta tensors."""
        for number, part in enumerate(self._parts):
            part.get_parameter_state_dp_zero = self._without_values(number)  # on the instance, inside this context only
        try:
            yield
        finally:
            for part in self._parts:
                del part.get_parameter_state_dp_zero  # the class's own method answers again

    def _without_values(self, number: int) -> Any:
        part = self._parts[number]

        def state(**_: Any) -> dict[Any, Any]:
            answer: dict[Any, Any] = {"buckets_coalesced": True}
            for buffer, ranges in enumerate(part.gbuf_ranges):
                numel = part.buffers[buffer].numel_unpadded
                world: dict[str, Any] = {}
                for key in _keys(part):
                    world[key] = torch.empty(numel, dtype=torch.float32, device="meta")
                    self._planned[number, buffer, key] = world[key]
                answer[buffer] = {dtype: {**world, "numel_unpadded": numel} for dtype in ranges}
            return answer

        return state

    def gather(self, wanted: Sequence[Pair]) -> Iterator[Pair]:
        """Gather all shards, piece by piece, and give the values of what this rank writes; every rank takes all of it.

        Args:
            wanted: meta tensors of the plan, and contiguous memory of their shape for each.

        Returns:
            Pieces of one dimension: values on the optimizer's device, and their part of that memory.

        Raises:
            ValueError: a tensor is no contiguous view of the plan's.
        """
        places = {planned.untyped_storage()._cdata: key for key, planned in self._planned.items()}
        sorted_by_start: dict[State, list[tuple[int, Tensor]]] = {key: [] for key in places.values()}
        for tensor, memory in wanted:
            place = places.get(tensor.untyped_storage()._cdata)
            if place is None or not tensor.is_contiguous():
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} is no contiguous part of the optimizer's state"
                )
            sorted_by_start[place].append((int(tensor.storage_offset()), memory.view(-1)))
        for entries in sorted_by_start.values():
            entries.sort(key=lambda entry: entry[0])
        for number, part in enumerate(self._parts):
            for buffer, ranges in enumerate(part.gbuf_ranges):
                for start, key, values in _gathered(part, buffer, next(iter(ranges.values()))):
                    yield from _overlaps(start, values, sorted_by_start[number, buffer, key])


def _keys(part: Any) -> tuple[str, ...]:
    return ("param", *part.optimizer_state_keys)


def _gathered(part: Any, buffer: int, buckets: Sequence[Any]) -> Iterator[tuple[int, str, Tensor]]:
    """Every piece of a buffer's state, on every rank: its start in the buffer without padding, which state it is, its values."""
    ranks, bucket_start = part.data_parallel_group.size(), 0
    for ranges, bucket in zip(buckets, part.buffers[buffer].buckets, strict=True):
        numel = bucket.grad_data.numel() // ranks
        for key in _keys(part):
            shard = torch.zeros(numel, dtype=torch.float32, device=bucket.grad_data.device)
            for param, where in ranges["param_map"].items():
                mine = where["gbuf_local"]
                shard[mine.start : mine.end].copy_(part._get_main_param_and_optimizer_states(param)[key].detach())
            length = max(1, PIECE_BYTES // (4 * ranks))
            for begin in range(0, numel, length):
                piece = shard[begin : begin + length]
                pieces = [torch.empty_like(piece) for _ in range(ranks)] if ranks > 1 else [piece]
                if ranks > 1:
                    dist.all_gather(pieces, piece, group=part.data_parallel_group)
                for rank, values in enumerate(pieces):
                    start = rank * numel + begin
                    there = max(0, min(len(values), bucket.numel_unpadded - start))
                    yield bucket_start + start, key, values[:there]
        bucket_start += bucket.numel_unpadded


def _overlaps(start: int, values: Tensor, entries: Sequence[tuple[int, Tensor]]) -> Iterator[Pair]:
    """What of ``values``, which begin at ``start``, belongs to ``entries``, which are sorted and do not overlap."""
    first = max(0, bisect_right(entries, start, key=lambda entry: entry[0]) - 1)
    for begin, memory in entries[first:]:
        if begin >= start + len(values):
            return
        low, high = max(start, begin), min(start + len(values), begin + len(memory))
        if low < high:
            yield values[low - start : high - start], memory[low - begin : high - begin]
