"""The bookkeeping of a decoding step in one kernel before and one behind the model: one program for all slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.overlap import overlap, wait_for_previous


@triton.jit
def _begin(
    positions, active, at, uniform, forced, rows, seen, lengths, my_uniform, my_forced, slots, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, BLOCK)
    inside = slot < slots
    position = tl.load(positions + slot, mask=inside, other=0)
    runs = tl.load(active + slot, mask=inside, other=0) > 0
    first = tl.load(at) * slots
    tl.store(rows + slot, tl.where(runs, position, capacity - 1), mask=inside)
    tl.store(seen + slot, tl.where(runs, position + 1, 1), mask=inside)
    tl.store(lengths + slot, position + 2, mask=inside)
    tl.store(my_uniform + slot, tl.load(uniform + first + slot, mask=inside, other=0.0), mask=inside)
    tl.store(my_forced + slot, tl.load(forced + first + slot, mask=inside, other=0), mask=inside)


@triton.jit
def _end(
    chosen, logprob, token, tokens, logprobs, positions, active, at, slots, capacity,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    slot = tl.arange(0, BLOCK)
    inside = slot < slots
    step = tl.load(at)
    new = tl.load(chosen + slot, mask=inside, other=0)
    tl.store(token + slot, new, mask=inside)
    tl.store(tokens + step * slots + slot, new, mask=inside)
    tl.store(logprobs + step * slots + slot, tl.load(logprob + slot, mask=inside, other=0.0), mask=inside)
    position = tl.load(positions + slot, mask=inside, other=0) + tl.load(active + slot, mask=inside, other=0)
    tl.store(positions + slot, tl.minimum(position, capacity - 1), mask=inside)
    tl.debug_barrier()  # every thread has read ``at``
    tl.store(at, step + 1)


def begin_step_triton(
    positions: Tensor, active: Tensor, at: Tensor, uniform: Tensor, forced: Tensor, capacity: int
) -> tuple[Tensor, ...]:
    """Take what ``begin_step`` takes; returns the fields of ``StepInputs``."""
    slots = positions.shape[0]
    found = *(torch.empty_like(positions) for _ in range(3)), torch.empty_like(uniform[0]), torch.empty_like(forced[0])
    _begin[(1,)](
        positions, active, at, uniform, forced, *found, slots, capacity, BLOCK=triton.next_power_of_2(slots), num_warps=4
    )  # fmt: skip
    return found


def end_step_triton(
    chosen: Tensor,
    logprob: Tensor,
    token: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    positions: Tensor,
    active: Tensor,
    at: Tensor,
    capacity: int,
) -> None:
    """Take what ``end_step`` takes."""
    slots = chosen.shape[0]
    _end[(1,)](
        chosen, logprob, token, tokens, logprobs, positions, active, at, slots, capacity,
        BLOCK=triton.next_power_of_2(slots), num_warps=4, **overlap(chosen.device),
    )  # fmt: skip
