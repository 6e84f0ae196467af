"""The next token of every row in one kernel, without sorting: a program per row, which reads its logits from the L2 cache.

The threshold of top-k, and that of top-p, is the largest key that leaves enough tokens, or enough probability, at or above it.
Keys are the logits' bits, in an order that integers share; a threshold is found bit by bit. Sums of probabilities are fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.overlap import overlap, wait_for_previous

BLOCK = 4096
"""At most so many logits are held at a time."""


@triton.jit
def _keys(x):
    """fp32 to int64 in [0, 2^32), in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) + 2147483648


@triton.jit
def _above(row, key, highest, scale, vocab, BLOCK: tl.constexpr):
    """The number of logits whose keys are at least ``key``, and the sum of their exp((x - highest) * scale) in fp64."""
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):  # loads beside each other; added up once, at the end
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        kept = (_keys(x) >= key) & (at < vocab)
        count += kept.to(tl.int32)
        total += tl.where(kept, tl.exp((x - highest) * scale), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(total, 0)


@triton.jit
def _likeliest(row, vocab, BLOCK: tl.constexpr):
    """The highest logit, the first token that has it, and the sum of exp(logit - highest) in fp64, in one pass."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -3.4e38, tl.float32)  # finite: the difference of two infinities is not a number
    best_at = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=4):
        at = start + lane
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        higher = tl.maximum(best, x)
        total = total * tl.exp(best - higher) + tl.exp(x - higher)
        best_at = tl.where(x > best, at, best_at)
        best = higher
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, best_at, vocab), 0).to(tl.int64)
    return highest, token, tl.sum((total * tl.exp(best - highest)).to(tl.float64), 0)


@triton.jit
def _choose(
    logits, temperature, top_k, top_p, uniform, banned, lengths, from_length, forced, tokens, logprobs, stride, vocab, B,
    BANS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """tokens [rows] int64 and logprobs [rows] fp32; banned logits are overwritten. Grid rows."""
    wait_for_previous(OVERLAP)
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    highest, token, mass = _likeliest(row, vocab, BLOCK)
    log_sum = highest + tl.log(mass).to(tl.float32)
    taken = tl.load(forced + number)
    taken_logit = tl.load(row + tl.maximum(taken, 0))
    if tl.load(lengths + number) < tl.load(from_length + number):
        place = tl.arange(0, BANS)
        ids = tl.load(banned + number * B + place, mask=place < B, other=0)
        tl.store(row + ids, tl.full([BANS], float("-inf"), tl.float32), mask=place < B)
        tl.debug_barrier()
        highest, token, mass = _likeliest(row, vocab, BLOCK)
    heat = tl.load(temperature + number)
    if heat > 0:
        scale = 1.0 / heat
        least = tl.zeros([], tl.int64)
        k = tl.load(top_k + number)
        if (k > 0) & (k < vocab):
            for step in range(32):
                key = least + (tl.full([], 1, tl.int64) << (31 - step))
                count, _ = _above(row, key, highest, scale, vocab, BLOCK)
                least = tl.where(count >= k, key, least)
        p = tl.load(top_p + number)
        if p < 1:
            _, mass = _above(row, least, highest, scale, vocab, BLOCK)
            among = least
            least = tl.zeros([], tl.int64)
            for step in range(32):
                key = least + (tl.full([], 1, tl.int64) << (31 - step))
                _, part = _above(row, tl.maximum(key, among), highest, scale, vocab, BLOCK)
                least = tl.where(part >= p * mass, key, least)
            least = tl.maximum(least, among)
        _, mass = _above(row, least, highest, scale, vocab, BLOCK)
        target = tl.load(uniform + number) * mass
        before = tl.zeros([], tl.float64)
        found = tl.zeros([], tl.int32)
        for start in range(0, vocab, BLOCK):
            offset = tl.arange(0, BLOCK)
            at = start + offset
            x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
            kept = (_keys(x) >= least) & (at < vocab)
            weight = tl.where(kept, tl.exp((x - highest) * scale), 0.0).to(tl.float64)
            part = tl.sum(weight, 0)
            if found == 0:
                last = tl.max(tl.where(kept & (weight > 0), offset, -1), 0)
                if last >= 0:  # rounding can leave the target above the last sum: then it is the last one
                    token = (start + last).to(tl.int64)
                if before + part > target:
                    inside = tl.minimum(tl.sum((before + tl.cumsum(weight, 0) <= target).to(tl.int32), 0), last)
                    token = (start + inside).to(tl.int64)
                    found += 1
            before += part
    chosen = tl.load(row + token)
    tl.store(tokens + number, tl.where(taken >= 0, taken, token))
    tl.store(logprobs + number, tl.where(taken >= 0, taken_logit, chosen) - log_sum)


def choose_tokens_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    banned: Tensor,
    lengths: Tensor,
    from_length: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take what ``choose_tokens`` takes; banned logits are overwritten."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    size = banned.shape[1]
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _choose[(rows,)](
        logits, temperature, top_k, top_p, uniform, banned, lengths, from_length, forced, tokens, logprobs,
        logits.stride(0), vocab, size, BANS=triton.next_power_of_2(size), BLOCK=block, num_warps=max(1, block // 256),
        **overlap(logits.device),
    )  # fmt: skip
    return tokens, logprobs
