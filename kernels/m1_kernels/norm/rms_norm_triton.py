"""RMSNorm of a weighted sum, forward and backward, each in one pass over memory.

``n = s * rsqrt(mean(s^2) + eps) * weight`` with ``s = alpha * x + beta * y`` (``s = x`` without y), all arithmetic fp32,
results rounded once. Rows are tokens; offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PROGRAMS_PER_PROCESSOR = 4
ELEMENTS = 4096  # of a block: as many rows at a time as that holds


@triton.jit
def _sum(x, y, at, inside, alpha, beta, ADD: tl.constexpr):
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = alpha * value + beta * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _forward(
    x, y, weight, n, rows, alpha, beta, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (c < C)
    value = _sum(x, y, row * C + c, inside, alpha, beta, ADD)
    scale = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(value * value, 1) / C + eps)
    tl.store(n + row * C + c, (value * rstd[:, None] * scale).to(n.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, y, weight, dn, dx, dy, dweight, rows, alpha, beta, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dx, dy [rows, C], and dweight [programs, C] fp32, to be summed. Each program strides blocks of rows."""
    c = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (c < C)
        at = row * C + c
        value = _sum(x, y, at, inside, alpha, beta, ADD)
        grad = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        rstd = (1 / tl.sqrt(tl.sum(value * value, 1) / C + eps))[:, None]
        unit = value * rstd
        total += grad * unit
        grad = grad * scale
        ds = rstd * (grad - unit * (tl.sum(grad * unit, 1) / C)[:, None])
        if ADD:
            tl.store(dy + at, (beta * ds).to(dy.dtype.element_ty), mask=inside)
            ds = alpha * ds
        tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside)
    column = tl.arange(0, BLOCK)
    tl.store(dweight + tl.program_id(0) * C + column, tl.sum(total, 0), mask=column < C)


def _sizes(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK": block, "ROWS": max(1, ELEMENTS // block), "num_warps": 8}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, alpha: float, beta: float, eps: float) -> Tensor:
        x, y = x.contiguous(), None if y is None else y.contiguous()
        n = torch.empty_like(x)
        rows, sizes = x.shape[0], _sizes(x.shape[1])
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        _forward[grid](x, y, weight, n, rows, alpha, beta, eps, ADD=y is not None, **sizes)
        ctx.save_for_backward(x, y, weight)
        ctx.settings = (alpha, beta, eps)
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        rows, sizes = x.shape[0], _sizes(x.shape[1])
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        programs = min(triton.cdiv(rows, sizes["ROWS"]), PROGRAMS_PER_PROCESSOR * processors)
        dx, dy = torch.empty_like(x), None if y is None else torch.empty_like(x)
        dweight = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
        dn = grads[0].contiguous()
        _backward[(programs,)](x, y, weight, dn, dx, dy, dweight, rows, *ctx.settings, ADD=y is not None, **sizes)
        return dx, dy, dweight.sum(0).to(weight.dtype), None, None, None


def add_rms_norm_triton(x: Tensor, y: Tensor | None, weight: Tensor, alpha: float, beta: float, eps: float) -> Tensor:
    """x, y [..., C], weight [C]; returns [..., C] in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _AddNorm.apply(flat, None if y is None else y.reshape(flat.shape), weight, alpha, beta, eps)
    return out.view(x.shape)
