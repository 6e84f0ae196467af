"""What a decoding step does to its slots before and behind the model. On a CUDA device one kernel each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m1_kernels.triton_support import takes_triton


class StepInputs(NamedTuple):
    """What a step reads of every slot, [slots] each."""

    rows: Tensor
    """int64 row of the cache that takes the keys and values of the slot's token."""
    seen: Tensor
    """int64 tokens that the slot attends to, with this one: at least 1."""
    lengths: Tensor
    """int64 tokens of the slot with the one that the step chooses."""
    uniform: Tensor
    """fp64."""
    forced: Tensor
    """int64."""


@torch.no_grad()
def begin_step(
    positions: Tensor, active: Tensor, at: Tensor, uniform: Tensor, forced: Tensor, *, capacity: int
) -> StepInputs:
    """Return the inputs of a step.

    A slot that is not active writes to the last row of its cache, which no answer reads, and attends to one token.

    Args:
        positions: [slots] int64 position of each slot's token.
        active: [slots] int64, 1 or 0.
        at: [1] int64 number of the step.
        uniform, forced: [steps, slots] fp64 and int64: row ``at`` is returned.
        capacity: rows of a slot's cache.
    """
    if takes_triton(positions):
        from m1_kernels.decode.bookkeeping_triton import begin_step_triton

        return StepInputs(*begin_step_triton(positions, active, at, uniform, forced, capacity))
    return StepInputs(
        rows=torch.where(active > 0, positions, capacity - 1),
        seen=torch.where(active > 0, positions + 1, 1),
        lengths=positions + 2,
        uniform=uniform.index_select(0, at)[0],
        forced=forced.index_select(0, at)[0],
    )


@torch.no_grad()
def end_step(
    chosen: Tensor,
    logprob: Tensor,
    *,
    token: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    positions: Tensor,
    active: Tensor,
    at: Tensor,
    capacity: int,
) -> None:
    """Take over the chosen tokens, and go on to the next step; everything is changed in place.

    Args:
        chosen: [slots] int64, and ``logprob`` [slots] fp32.
        token: [slots] int64: becomes ``chosen``.
        tokens, logprobs: [steps, slots]: their row ``at`` becomes ``chosen`` and ``logprob``.
        positions: [slots] int64: one more for active slots, at most ``capacity - 1``: an answer that has ended runs on until
            the host sees it, and must stay inside of its slot.
        active: [slots] int64, 1 or 0.
        at: [1] int64: one more.
    """
    if takes_triton(chosen):
        from m1_kernels.decode.bookkeeping_triton import end_step_triton

        end_step_triton(chosen, logprob, token, tokens, logprobs, positions, active, at, capacity)
        return
    token.copy_(chosen)
    tokens.index_copy_(0, at, chosen[None])
    logprobs.index_copy_(0, at, logprob[None])
    positions.add_(active).clamp_(max=capacity - 1)
    at.add_(1)
