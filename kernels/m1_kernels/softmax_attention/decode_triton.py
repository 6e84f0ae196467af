"""Decode attention: one query per sequence and head against a ragged cache, the keys of a sequence split over programs.

Flash-decoding: every program keeps the running maximum, sum and weighted values of its share of the keys; a second kernel joins
the shares. A program serves all query heads of one key head, so that each key is read once. Offsets are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.overlap import overlap, wait_for_previous

KEYS_AT_ONCE = 64
PROGRAMS = 1024
"""About as many programs are started: a few for each processor."""
_LOG2_E = 1.4426950408889634


@triton.jit
def _partial(
    q, k, v, lengths, part, top, total, scale, q_slot, q_head, k_slot, k_token, k_head, KV, splits,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """part [slots, KV, splits, G, D] fp32, top and total [slots, KV, splits, G] of each program's keys. k, v share strides."""
    wait_for_previous(OVERLAP)
    program = tl.program_id(0)
    split = program % splits
    head = program // splits % KV
    slot = (program // splits // KV).to(tl.int64)
    length = tl.load(lengths + slot).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), N) * N
    first = split * share
    end = tl.minimum(first + share, length)
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, DIM)
    inside = (member < G)[:, None] & (channel < D)[None, :]
    query = tl.load(
        q + slot * q_slot + (head * G + member[:, None]) * q_head + channel[None, :], mask=inside, other=0.0
    )
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    sums = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, DIM], tl.float32)
    base = slot * k_slot + head * k_head
    for at in range(first, end, N):
        token = at + tl.arange(0, N)
        there = (token < end)[:, None] & (channel < D)[None, :]
        where = base + token.to(tl.int64)[:, None] * k_token + channel[None, :]
        key = tl.load(k + where, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((token < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        value = tl.load(v + where, mask=there, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        sums = sums * shrink + tl.sum(weights, 1)
        highest = higher
    row = ((slot * KV + head) * splits + split) * G + member
    tl.store(top + row, highest, mask=member < G)
    tl.store(total + row, sums, mask=member < G)
    tl.store(part + row[:, None] * D + channel[None, :], out, mask=inside)


@triton.jit
def _joined(
    part, top, total, out, splits, H, G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [slots, H, D] from the shares. Grid slots * H."""
    wait_for_previous(OVERLAP)
    program = tl.program_id(0)
    head = program % H
    slot = (program // H).to(tl.int64)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, DIM)
    row = ((slot * (H // G) + head // G) * splits + split) * G + head % G
    there = split < splits
    highest = tl.load(top + row, mask=there, other=float("-inf"))
    factor = tl.exp2(highest - tl.max(highest, 0))
    sums = tl.sum(tl.load(total + row, mask=there, other=0.0) * factor, 0)
    inside = there[:, None] & (channel < D)[None, :]
    values = tl.load(part + row[:, None] * D + channel[None, :], mask=inside, other=0.0)
    result = tl.sum(values * factor[:, None], 0) / sums
    tl.store(out + (slot * H + head) * D + channel, result.to(out.dtype.element_ty), mask=channel < D)


def decode_attention_triton(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """q [slots, H, D], keys and values [slots, capacity, KV, D], lengths [slots] >= 1; returns [slots, H, D]."""
    slots, heads, dim = q.shape
    capacity, kv = keys.shape[1:3]
    group = heads // kv
    assert keys.stride() == values.stride(), "keys and values share their strides"
    if q.stride(2) != 1:
        q = q.contiguous()
    splits = max(1, min(PROGRAMS // (slots * kv), triton.cdiv(capacity, KEYS_AT_ONCE)))
    part = torch.empty(slots, kv, splits, group, dim, dtype=torch.float32, device=q.device)
    top, total = (torch.empty(slots, kv, splits, group, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(slots, heads, dim, dtype=q.dtype, device=q.device)
    padded = triton.next_power_of_2(dim)
    _partial[(slots * kv * splits,)](
        q, keys, values, lengths, part, top, total, _LOG2_E * dim**-0.5, *q.stride()[:2], *keys.stride()[:3], kv, splits,
        G=group, GROUP=max(16, triton.next_power_of_2(group)), D=dim, DIM=max(16, padded), N=KEYS_AT_ONCE, num_warps=4,
        **overlap(q.device),
    )  # fmt: skip
    _joined[(slots * heads,)](
        part, top, total, out, splits, heads, G=group, D=dim, DIM=padded, SPLITS=triton.next_power_of_2(splits),
        num_warps=4, **overlap(q.device),
    )  # fmt: skip
    return out
