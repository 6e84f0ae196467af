"""Rotary embedding in one pass over memory, forward and backward; for decoding, straight into the cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.overlap import overlap, wait_for_previous


@triton.jit
def _rotate(
    x, out, positions, frequencies, token_stride, head_stride, sign,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """out [T, H, D] contiguous; x [T, H, D] with its own strides of token and head. Grid tokens."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pair, mask=pair < HALF, other=0.0)
    cos, sin = tl.cos(angle)[None, :], (sign * tl.sin(angle))[None, :]
    inside = (head < H) & (pair < HALF)[None, :]
    read = x + token * token_stride + head * head_stride + pair[None, :]
    write = out + token * (H * D) + head * D + pair[None, :]
    first = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(write, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(write + HALF, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        c = tl.arange(0, REST)[None, :]
        inside = (head < H) & (c < D - 2 * HALF)
        value = tl.load(x + token * token_stride + head * head_stride + 2 * HALF + c, mask=inside, other=0.0)
        tl.store(out + token * (H * D) + head * D + 2 * HALF + c, value, mask=inside)


def _run(x: Tensor, positions: Tensor, frequencies: Tensor, sign: float) -> Tensor:
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(2) != 1:
        x = x.contiguous()
    half = frequencies.numel()
    rest = triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0
    _rotate[(tokens,)](
        x, out, positions, frequencies, x.stride(0), x.stride(1), sign, H=heads, D=dim, HALF=half,
        HEADS=triton.next_power_of_2(heads), PAIRS=triton.next_power_of_2(half), REST=rest, num_warps=4,
    )  # fmt: skip
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        ctx.save_for_backward(positions, frequencies)
        return _run(x, positions, frequencies, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        positions, frequencies = ctx.saved_tensors
        return _run(grads[0], positions, frequencies, -1.0), None, None


def apply_rotary_triton(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x [T, H, D], positions [T], frequencies [rotary_dim / 2] fp32; returns [T, H, D]."""
    out: Tensor = _Rotary.apply(x, positions, frequencies)
    return out


@triton.jit
def _rotate_into_cache(
    x, q, keys, values, positions, rows, frequencies, slot_stride, row_stride, head_stride,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    MEMBERS: tl.constexpr, DIM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """q [slots, KV * G, D] and a row of keys and values from x [slots, KV, G + 2, D]: G queries, key, value. Grid (slots, KV)."""
    wait_for_previous(OVERLAP)
    slot, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member = tl.arange(0, MEMBERS)[:, None]
    c = tl.arange(0, DIM)[None, :]
    inside = (member < G + 2) & (c < D)
    turned = (member <= G) & (c < 2 * HALF)
    read = x + ((slot * KV + group) * (G + 2) + member) * D
    value = tl.load(read + c, mask=inside, other=0.0)
    partner = tl.load(read + tl.where(c < HALF, c + HALF, c - HALF), mask=inside & turned, other=0.0).to(tl.float32)
    angle = tl.load(positions + slot).to(tl.float32) * tl.load(frequencies + c % HALF)
    rotated = value.to(tl.float32) * tl.cos(angle) + tl.where(c < HALF, -partner, partner) * tl.sin(angle)
    out = tl.where(turned, rotated.to(value.dtype), value)
    tl.store(q + ((slot * KV + group) * G + member) * D + c, out, mask=inside & (member < G))
    at = slot * slot_stride + tl.load(rows + slot) * row_stride + group * head_stride + c
    tl.store(keys + at + member * 0, out, mask=inside & (member == G))
    tl.store(values + at + member * 0, out, mask=inside & (member == G + 1))


def rotate_into_cache_triton(
    x: Tensor, positions: Tensor, rows: Tensor, frequencies: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """x [slots, KV, G + 2, D], keys and values [slots, capacity, KV, D]; returns the rotated queries [slots, KV * G, D]."""
    slots, kv, members, dim = x.shape
    assert keys.stride() == values.stride(), "keys and values share their strides"
    q = torch.empty(slots, kv * (members - 2), dim, dtype=x.dtype, device=x.device)
    _rotate_into_cache[(slots, kv)](
        x.contiguous(), q, keys, values, positions, rows, frequencies, *keys.stride()[:3], KV=kv, G=members - 2, D=dim,
        HALF=frequencies.numel(), MEMBERS=triton.next_power_of_2(members), DIM=triton.next_power_of_2(dim), num_warps=4,
        **overlap(x.device),
    )  # fmt: skip
    return q
