"""The mixture of experts for few tokens: each weight is read once, by the program that multiplies with it.

A program has some rows of one expert's matrix, and up to 16 of the slots (token and place among its experts) that chose the
expert. It finds them itself, and multiplies their tokens with its rows. Before that, and before it waits for the kernel before,
it brings the first weights of the expert that it probably has into the L2 cache: of its own number, as if each had one group.
Where an expert has more slots, other programs take them at the same time, and the weights come from the L2 cache; with many
slots, up to 64 are taken together. An expert that nobody chose is not multiplied with. Offsets of weights are 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.overlap import SECTOR, overlap, prefetch, start_next, wait_for_previous


class Tiles(NamedTuple):
    """Rows of a matrix that a program has, columns of 2 bytes that it reads at a time, its warps and stages of loads."""

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self, x: Tensor) -> dict[str, int]:
        """As a launch takes them, for matrices of x's dtype: wider numbers need as much shared memory."""
        return {
            "N": self.rows,
            "BLOCK": self.columns * 2 // x.itemsize,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


UP, DOWN = Tiles(32, 128, 4, 2), Tiles(64, 128, 4, 4)
"""Of those tried on an H200 the fastest: with them all programs of 16 experts run at the same time."""
AHEAD = 512
"""Bytes of each row that are read into the L2 cache before a program knows its expert; a power of 2, or 0."""
FEW, MANY = 16, 64
"""Slots that a program multiplies together: ``MANY`` where experts can have more than ``FEW`` on average."""


@triton.jit
def choose_experts(left, token, weights, index, K: tl.constexpr, BLOCK: tl.constexpr):
    """weights, index [T, K] at ``token``, of its logits [BLOCK]: -inf where there is no expert."""
    expert = tl.arange(0, BLOCK)
    highest = tl.max(left, 0)
    mine = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(K):
        value, chosen = tl.max(left, 0, return_indices=True)
        mine = tl.where(expert == place, tl.exp(value - highest), mine)
        tl.store(index + token * K + place, chosen.to(tl.int64))
        left = tl.where(expert == chosen, float("-inf"), left)
    tl.store(weights + token * K + expert, mine / tl.sum(mine, 0), mask=expert < K)


@triton.jit
def _route(logits, weights, index, E, K: tl.constexpr, BLOCK: tl.constexpr):
    """weights, index [T, K] of logits [T, E]. Grid T."""
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    left = tl.load(logits + token * E + expert, mask=expert < E, other=float("-inf"))
    choose_experts(left, token, weights, index, K, BLOCK)


@triton.jit
def _work_of(
    index, number, first, slots, experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """The ``number``-th group of up to M slots that chose the same expert: the expert here, the slots [M], which there are [M].

    Behind the last group the expert is ``experts`` or more.
    """
    slot, expert = tl.arange(0, SLOTS), tl.arange(0, EXPERTS)
    chosen = (tl.load(index + slot, mask=slot < slots, other=-1) - first).to(tl.int32)
    counts = tl.sum((chosen[None, :] == expert[:, None]).to(tl.int32), 1)
    groups = tl.where(expert < experts, (counts + M - 1) // M, 0)
    ends = tl.cumsum(groups, 0)
    mine = tl.sum((ends <= number).to(tl.int32), 0)
    start = (number - tl.sum(tl.where(expert < mine, groups, 0), 0)) * M
    is_mine = (chosen == mine).to(tl.int32)
    rank = tl.where(is_mine > 0, tl.cumsum(is_mine, 0) - 1, -1)
    wanted = start + tl.arange(0, M)
    found = rank[None, :] == wanted[:, None]
    return mine, tl.sum(tl.where(found, slot[None, :], 0), 1), wanted < tl.sum(is_mine, 0)


@triton.jit
def _read_ahead(matrix, row, rows, columns, AHEAD: tl.constexpr):
    """Bring the first AHEAD bytes of the rows [N] of a matrix [rows, columns] into the L2 cache."""
    if AHEAD > 0:
        size: tl.constexpr = matrix.dtype.element_ty.primitive_bitwidth // 8
        at = tl.minimum(tl.arange(0, AHEAD // SECTOR) * SECTOR, (columns - 1) * size)
        start = matrix.to(tl.int64) + tl.minimum(row, rows - 1).to(tl.int64) * columns * size
        prefetch(start[:, None] + at[None, :])


@triton.jit
def _up(
    x, w13, weights, index, inner, first, slots, experts, x_row, INNER, C, K: tl.constexpr, SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """inner [slots, INNER] = silu(w1 x) * (w3 x) * weight. Grid (groups of slots, INNER / N)."""
    row = tl.program_id(1) * N + tl.arange(0, N)
    likely = tl.program_id(0).to(tl.int64)
    if likely < experts:
        _read_ahead(w13 + likely * 2 * INNER * C, row, INNER, C, AHEAD)
        _read_ahead(w13 + (likely * 2 + 1) * INNER * C, row, INNER, C, AHEAD)
    wait_for_previous(OVERLAP, START_NEXT=False)
    expert, slot, there = _work_of(index, tl.program_id(0), first, slots, experts, SLOTS, EXPERTS, M)
    if expert < experts:
        gate_at = w13 + (expert.to(tl.int64) * 2 * INNER + row[:, None]) * C
        up_at = gate_at + INNER.to(tl.int64) * C
        gate = tl.zeros([M, N], tl.float32)
        up = tl.zeros([M, N], tl.float32)
        for at in range(0, C, BLOCK):
            c = at + tl.arange(0, BLOCK)
            part = tl.load(
                x + (slot // K)[:, None] * x_row + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0
            )
            inside = (row < INNER)[:, None] & (c < C)[None, :]
            gate += tl.dot(
                part, tl.trans(tl.load(gate_at + c[None, :], mask=inside, other=0.0)), input_precision="ieee"
            )
            up += tl.dot(part, tl.trans(tl.load(up_at + c[None, :], mask=inside, other=0.0)), input_precision="ieee")
        start_next(OVERLAP)  # not before: what it reads ahead would be driven out of the cache again
        scale = tl.load(weights + slot, mask=there, other=0.0)
        out = gate * tl.sigmoid(gate) * up * scale[:, None]
        tl.store(
            inner + slot[:, None] * INNER + row[None, :], out.to(inner.dtype.element_ty),
            mask=there[:, None] & (row < INNER)[None, :],
        )  # fmt: skip


@triton.jit
def _down(
    inner, w2, index, out, first, slots, experts, INNER, C, SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [slots, C] = w2 inner. Grid (groups of slots, C / N)."""
    row = tl.program_id(1) * N + tl.arange(0, N)
    likely = tl.program_id(0).to(tl.int64)
    if likely < experts:
        _read_ahead(w2 + likely * C * INNER, row, C, INNER, AHEAD)
    wait_for_previous(OVERLAP)
    expert, slot, there = _work_of(index, tl.program_id(0), first, slots, experts, SLOTS, EXPERTS, M)
    if expert < experts:
        weight_at = w2 + (expert.to(tl.int64) * C + row[:, None]) * INNER
        total = tl.zeros([M, N], tl.float32)
        for at in range(0, INNER, BLOCK):
            c = at + tl.arange(0, BLOCK)
            part = tl.load(
                inner + slot[:, None] * INNER + c[None, :], mask=there[:, None] & (c < INNER)[None, :], other=0.0
            )
            weight = tl.load(weight_at + c[None, :], mask=(row < C)[:, None] & (c < INNER)[None, :], other=0.0)
            total += tl.dot(part, tl.trans(weight), input_precision="ieee")
        tl.store(
            out + slot[:, None] * C + row[None, :], total.to(out.dtype.element_ty),
            mask=there[:, None] & (row < C)[None, :],
        )  # fmt: skip


@triton.jit
def _sum_slots(rows, index, out, first, experts, C, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out [T, C]: the sum of a token's slots whose experts are here. Grid (T, C / BLOCK)."""
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(K):
        expert = tl.load(index + token * K + place) - first
        end = tl.where((expert >= 0) & (expert < experts), C, 0)
        total += tl.load(rows + (token * K + place) * C + c, mask=c < end, other=0.0).to(tl.float32)
    tl.store(out + token * C + c, total.to(out.dtype.element_ty), mask=c < C)


def route_triton(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[T, E] fp32 to combine weights [T, k] fp32 and experts [T, k] int64."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    index = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    block = max(triton.next_power_of_2(experts), triton.next_power_of_2(k))
    _route[(tokens,)](logits.contiguous(), weights, index, experts, K=k, BLOCK=block, num_warps=1)
    return weights, index


def expert_rows_triton(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, first: int) -> Tensor:
    """x [T, h], w13 [E, 2, I, h], w2 [E, h, I], weights and index [T, k]; returns [T, k, h], of experts that are here."""
    (tokens, width), (experts, _, hidden, _), k = x.shape, w13.shape, index.shape[1]
    slots = tokens * k
    inner = x.new_empty(slots, hidden)
    rows = x.new_empty(tokens, k, width)
    together = FEW if slots <= FEW * experts else MANY
    groups = min(slots, experts + slots // together)  # at most
    sizes = {
        "SLOTS": triton.next_power_of_2(slots), "EXPERTS": triton.next_power_of_2(experts), "M": together,
        **overlap(x.device),
    }  # fmt: skip
    sizes["AHEAD"] = AHEAD if sizes["OVERLAP"] else 0
    _up[(groups, triton.cdiv(hidden, UP.rows))](
        x, w13, weights, index, inner, first, slots, experts, x.stride(0), hidden, width, K=k, **sizes, **UP.options(x)
    )
    _down[(groups, triton.cdiv(width, DOWN.rows))](
        inner, w2, index, rows, first, slots, experts, hidden, width, **sizes, **DOWN.options(x)
    )
    return rows


def mix_few_triton(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, first: int) -> Tensor:
    """Take what ``expert_rows_triton`` takes; returns [T, h]."""
    rows = expert_rows_triton(x, w13, w2, weights, index, first)
    (tokens, k, width), out = rows.shape, torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(width))
    _sum_slots[(tokens, triton.cdiv(width, block))](
        rows, index, out, first, w13.shape[0], width, K=k, BLOCK=block, num_warps=4, **overlap(x.device)
    )
    return out
