"""The mixture of experts for few tokens: each weight is read once, by the program that multiplies with it.

A program has some rows of one expert's matrix. It finds the slots (token and place among its experts) that chose the expert,
up to 64 at a time, and multiplies their tokens with its rows; up to 16 with a smaller product. An expert that nobody chose is not
read. Offsets of weights are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.overlap import overlap, wait_for_previous

ROWS_UP, ROWS_DOWN, COLUMNS = 32, 64, 128
"""Rows of a matrix that a program has, and columns it reads at a time; of those tried on an H200 the fastest."""
FEW, MANY = 16, 64
"""Slots of an expert that are multiplied together: ``FEW`` if it has no more, else ``MANY``; for those that are left, its weights
are read again. With 16 alone instead of 64 alone, 64 tokens took 33 % longer where one expert of 16 has 35 of the 128 slots, and
8 % less where all have about 8."""


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
def _slots_of(index, expert, slots, SLOTS: tl.constexpr):
    """How many slots chose ``expert``, and the rank of each of [SLOTS] among them; -1 for the others."""
    slot = tl.arange(0, SLOTS)
    chosen = (tl.load(index + slot, mask=slot < slots, other=-1) == expert).to(tl.int32)
    return tl.sum(chosen, 0), tl.where(chosen > 0, tl.cumsum(chosen, 0) - 1, -1)


@triton.jit
def _members(rank, start, count, SLOTS: tl.constexpr, M: tl.constexpr):
    """The slots of ranks ``start`` to ``start + M``, [M], and which of them there are."""
    wanted = start + tl.arange(0, M)
    found = rank[None, :] == wanted[:, None]
    return tl.sum(tl.where(found, tl.arange(0, SLOTS)[None, :], 0), 1), wanted < count


@triton.jit
def _up_together(
    x, gate_at, up_at, weights, inner, rank, start, count, row, x_row, INNER, C,
    K: tl.constexpr, SLOTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, there = _members(rank, start, count, SLOTS, M)
    gate = tl.zeros([M, N], tl.float32)
    up = tl.zeros([M, N], tl.float32)
    for at in range(0, C, BLOCK):
        c = at + tl.arange(0, BLOCK)
        part = tl.load(x + (slot // K)[:, None] * x_row + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        inside = (row < INNER)[:, None] & (c < C)[None, :]
        gate += tl.dot(part, tl.trans(tl.load(gate_at + c[None, :], mask=inside, other=0.0)), input_precision="ieee")
        up += tl.dot(part, tl.trans(tl.load(up_at + c[None, :], mask=inside, other=0.0)), input_precision="ieee")
    scale = tl.load(weights + slot, mask=there, other=0.0)
    out = gate * tl.sigmoid(gate) * up * scale[:, None]
    tl.store(
        inner + slot[:, None] * INNER + row[None, :], out.to(inner.dtype.element_ty),
        mask=there[:, None] & (row < INNER)[None, :],
    )  # fmt: skip


@triton.jit
def _up(
    x, w13, weights, index, inner, first, slots, x_row, INNER, C, K: tl.constexpr, SLOTS: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """inner [slots, INNER] = silu(w1 x) * (w3 x) * weight. Grid (experts here, INNER / N)."""
    wait_for_previous(OVERLAP)
    expert = tl.program_id(0)
    count, rank = _slots_of(index, expert + first, slots, SLOTS)
    row = tl.program_id(1) * N + tl.arange(0, N)
    gate_at = w13 + (expert.to(tl.int64) * 2 * INNER + row[:, None]) * C
    up_at = gate_at + INNER.to(tl.int64) * C
    if (count > 0) & (count <= FEW):
        _up_together(
            x, gate_at, up_at, weights, inner, rank, 0, count, row, x_row, INNER, C,
            K=K, SLOTS=SLOTS, M=FEW, N=N, BLOCK=BLOCK,
        )  # fmt: skip
    if MANY > FEW and count > FEW:
        for start in range(0, count, MANY):
            _up_together(
                x, gate_at, up_at, weights, inner, rank, start, count, row, x_row, INNER, C,
                K=K, SLOTS=SLOTS, M=MANY, N=N, BLOCK=BLOCK,
            )  # fmt: skip


@triton.jit
def _down_together(
    inner, weight_at, out, rank, start, count, row, INNER, C,
    SLOTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, there = _members(rank, start, count, SLOTS, M)
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
def _down(
    inner, w2, index, out, first, slots, INNER, C, SLOTS: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [slots, C] = w2 inner. Grid (experts here, C / N)."""
    wait_for_previous(OVERLAP)
    expert = tl.program_id(0)
    count, rank = _slots_of(index, expert + first, slots, SLOTS)
    row = tl.program_id(1) * N + tl.arange(0, N)
    weight_at = w2 + (expert.to(tl.int64) * C + row[:, None]) * INNER
    if (count > 0) & (count <= FEW):
        _down_together(inner, weight_at, out, rank, 0, count, row, INNER, C, SLOTS=SLOTS, M=FEW, N=N, BLOCK=BLOCK)
    if MANY > FEW and count > FEW:
        for start in range(0, count, MANY):
            _down_together(
                inner, weight_at, out, rank, start, count, row, INNER, C, SLOTS=SLOTS, M=MANY, N=N, BLOCK=BLOCK
            )


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
    many = min(max(triton.next_power_of_2(tokens), FEW), MANY)  # a token chooses an expert once
    sizes = {"SLOTS": triton.next_power_of_2(slots), "FEW": FEW, "MANY": many, "BLOCK": COLUMNS, "num_warps": 4}
    sizes |= overlap(x.device)
    _up[(experts, triton.cdiv(hidden, ROWS_UP))](
        x, w13, weights, index, inner, first, slots, x.stride(0), hidden, width, K=k, N=ROWS_UP, **sizes
    )
    _down[(experts, triton.cdiv(width, ROWS_DOWN))](
        inner, w2, index, rows, first, slots, hidden, width, N=ROWS_DOWN, **sizes
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
