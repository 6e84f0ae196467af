"""Element-wise parts of the experts: gated activation and the sum of a token's experts. Offsets are 64-bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a block


@triton.jit
def _swiglu(gate_up, weight, out, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row)
    for start in range(0, INNER, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < INNER
        gate = tl.load(gate_up + row * (2 * INNER) + c, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * (2 * INNER) + INNER + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * INNER + c, (gate * tl.sigmoid(gate) * up * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    gate_up, weight, d_out, out, d_gate_up, d_weight, INNER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, INNER, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < INNER
        gate = tl.load(gate_up + row * (2 * INNER) + c, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * (2 * INNER) + INNER + c, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(d_out + row * INNER + c, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += grad * silu * up
        tl.store(out + row * INNER + c, (silu * up * scale).to(out.dtype.element_ty), mask=inside)
        grad = grad * scale
        d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(d_gate_up + row * (2 * INNER) + c, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_gate_up + row * (2 * INNER) + INNER + c, (grad * silu).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_weight + row, tl.sum(total, 0))


@triton.jit
def _sum_rows(rows, place, out, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < C
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for slot in tl.static_range(K):
            row = tl.load(place + token * K + slot)
            total += tl.load(rows + row * C + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * C + c, total.to(out.dtype.element_ty), mask=inside)


def _block(columns: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(columns))


def swiglu_triton(gate_up: Tensor, weight: Tensor) -> Tensor:
    """[M, 2 I] and [M] fp32 to [M, I]."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    if rows:
        _swiglu[(rows,)](gate_up, weight, out, INNER=inner, BLOCK=_block(inner), num_warps=4)
    return out


def swiglu_backward_triton(gate_up: Tensor, weight: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation [M, I] again, and the gradients of ``gate_up`` and ``weight``."""
    rows, inner = d_out.shape
    out, d_gate_up, d_weight = torch.empty_like(d_out), torch.empty_like(gate_up), torch.empty_like(weight)
    if rows:
        _swiglu_backward[(rows,)](
            gate_up, weight, d_out, out, d_gate_up, d_weight, INNER=inner, BLOCK=_block(inner), num_warps=4
        )
    return out, d_gate_up, d_weight


def sum_rows_triton(rows: Tensor, place: Tensor, out: Tensor) -> None:
    """out [T, C] = sum over k of rows[place[t, k]], rows [M, C], place [T, K] int64."""
    tokens, slots = place.shape
    width = rows.shape[1]
    _sum_rows[(tokens,)](rows, place, out, C=width, K=slots, BLOCK=_block(width), num_warps=4)
