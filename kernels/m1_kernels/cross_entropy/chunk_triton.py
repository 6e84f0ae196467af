"""The element-wise side of the linear cross-entropy: each pass reads a chunk's fp32 logits once. Offsets are 64-bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # of a block


@triton.jit
def _statistics(logits, labels, top, total, target, stride, valid, first, V: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit, sum of exp(logit - largest), and logit of the label (0 where another rank has it) of each row."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + c, mask=c < valid, other=float("-inf"))
        new = tl.maximum(largest, value)
        base = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(largest - base) + tl.exp(value - base)
        largest = new
    best = tl.max(largest, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(top + row, best)
    tl.store(total + row, tl.sum(sums * tl.exp(largest - base), 0))
    label = tl.load(labels + row) - first
    mine = (label >= 0) & (label < valid)
    tl.store(target + row, tl.load(logits + row * stride + label, mask=mine, other=0.0))


@triton.jit
def _errors(logits, log_z, labels, grad, out, stride, valid, first, V: tl.constexpr, BLOCK: tl.constexpr):
    """out [c, V] = (softmax - one-hot) * grad; 0 in padding."""
    row = tl.program_id(0).to(tl.int64)
    z, scale = tl.load(log_z + row), tl.load(grad + row)
    label = tl.load(labels + row) - first
    label = tl.where(label < valid, label, -1)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.exp(tl.load(logits + row * stride + c, mask=c < valid, other=float("-inf")) - z)
        value = (value - tl.where(c == label, 1.0, 0.0)) * scale
        tl.store(out + row * V + c, value.to(out.dtype.element_ty), mask=c < V)


def statistics(logits: Tensor, labels: Tensor, first_row: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [c, V] fp32, labels [c] int64; returns top, sum and target, [c] fp32 each."""
    rows, columns = logits.shape
    top, total, target = logits.new_empty(3, rows)
    _statistics[(rows,)](
        logits, labels, top, total, target, logits.stride(0), valid, first_row, V=columns, BLOCK=COLUMNS, num_warps=8
    )
    return top, total, target


def errors(
    logits: Tensor, log_z: Tensor, labels: Tensor, grad: Tensor, first_row: int, valid: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of the logits [c, V], in ``dtype``."""
    rows, columns = logits.shape
    out = torch.empty(rows, columns, dtype=dtype, device=logits.device)
    _errors[(rows,)](
        logits, log_z, labels, grad, out, logits.stride(0), valid, first_row, V=columns, BLOCK=COLUMNS, num_warps=8
    )
    return out
