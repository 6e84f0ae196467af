"""Norms of a post-norm layer together with their neighbours: the router behind one, the sum over a token's experts before one.

A program per token. Arithmetic is fp32; what a separate kernel would have read is rounded as that kernel's input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.moe.decode_triton import choose_experts
from m1_kernels.overlap import overlap, wait_for_previous

ROUTER_ELEMENTS = 16384
"""Elements of the router's matrix that a program holds at a time."""


@triton.jit
def _sum(x, y, at, inside, alpha, beta):
    return alpha * tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + beta * tl.load(
        y + at, mask=inside, other=0.0
    ).to(tl.float32)


@triton.jit
def _norm_and_route(
    x, y, norm, router, out, weights, index, alpha, beta, eps, E, C: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [T, C], weights and index [T, K]. Grid T."""
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    whole = tl.arange(0, BLOCK)
    summed = _sum(x, y, token * C + whole, whole < C, alpha, beta)
    rstd = 1 / tl.sqrt(tl.sum(summed * summed, 0) / C + eps)
    expert = tl.arange(0, EXPERTS)
    logits = tl.zeros([EXPERTS], tl.float32)
    for start in range(0, C, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = c < C
        value = _sum(x, y, token * C + c, inside, alpha, beta) * rstd
        rounded = (value * tl.load(norm + c, mask=inside, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + token * C + c, rounded, mask=inside)
        row = tl.load(
            router + expert[:, None] * C + c[None, :], mask=(expert < E)[:, None] & inside[None, :], other=0.0
        )
        logits += tl.sum(row.to(tl.float32) * rounded.to(tl.float32)[None, :], 1)
    logits = tl.where(expert < E, logits, float("-inf"))
    choose_experts(logits, token, weights, index, K, EXPERTS)


@triton.jit
def _sum_and_norm(
    rows, x, norm, out, alpha, beta, eps, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """out [T, C] from x [T, C] and the rows [T, K, C] of each token's experts. Grid T."""
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(K):
        total += tl.load(rows + (token * K + place) * C + c, mask=inside, other=0.0).to(tl.float32)
    value = alpha * tl.load(x + token * C + c, mask=inside, other=0.0).to(tl.float32) + beta * total
    rstd = 1 / tl.sqrt(tl.sum(value * value, 0) / C + eps)
    scale = tl.load(norm + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * C + c, (value * rstd * scale).to(out.dtype.element_ty), mask=inside)


def norm_and_route_triton(
    x: Tensor, y: Tensor, norm: Tensor, router: Tensor, k: int, alpha: float, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [T, C], norm [C], router [E, C]; returns the norm [T, C], weights [T, k] fp32 and experts [T, k] int64."""
    x, y, router = x.contiguous(), y.contiguous(), router.contiguous()
    (tokens, width), experts = x.shape, router.shape[0]
    out = torch.empty_like(x)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    index = torch.empty(tokens, k, dtype=torch.int64, device=x.device)
    block, padded = triton.next_power_of_2(width), triton.next_power_of_2(experts)
    _norm_and_route[(tokens,)](
        x, y, norm, router, out, weights, index, alpha, beta, eps, experts, C=width, K=k, BLOCK=block,
        COLUMNS=min(block, max(16, ROUTER_ELEMENTS // padded)), EXPERTS=padded, num_warps=8, **overlap(x.device),
    )  # fmt: skip
    return out, weights, index


def sum_and_norm_triton(rows: Tensor, x: Tensor, norm: Tensor, alpha: float, beta: float, eps: float) -> Tensor:
    """rows [T, k, C], x [T, C], norm [C]; returns the norm of ``alpha x + beta sum(rows)``, [T, C]."""
    x = x.contiguous()
    (tokens, k, width), out = rows.shape, torch.empty_like(x)
    _sum_and_norm[(tokens,)](
        rows, x, norm, out, alpha=alpha, beta=beta, eps=eps, C=width, K=k, BLOCK=triton.next_power_of_2(width), num_warps=8,
        **overlap(x.device),
    )  # fmt: skip
    return out
