"""The element-wise work around the attention in its layer, in as few passes over memory as possible.

The layer's projection is x [tokens, H, {q, k, v, gate}, D]. ``split_silu`` makes q, k, v of it; ``norm_gate`` is
``y = o * rsqrt(mean(o^2) + eps) * weight * sigmoid(gate)`` over all heads' channels of a token. All arithmetic is fp32,
results are rounded once. Offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m1_kernels.overlap import wait_for_previous


@triton.jit
def split_silu(x, q, k, v, rows, D: tl.constexpr, ROWS: tl.constexpr):
    """q, k, v [rows, D] = silu(x[rows, 0..2, D]), rows of (token, head). Grid rows / ROWS."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, D)[None, :]
    inside = row < rows
    for part in tl.static_range(3):
        value = tl.load(x + row * (4 * D) + part * D + channel, mask=inside, other=0.0).to(tl.float32)
        out = q if part == 0 else (k if part == 1 else v)
        tl.store(out + row * D + channel, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def split_silu_backward(x, dq, dk, dv, dx, rows, D: tl.constexpr, ROWS: tl.constexpr):
    """dx[rows, 0..2, D] from the gradients of q, k, v [rows, D]. Grid rows / ROWS."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, D)[None, :]
    inside = row < rows
    for part in tl.static_range(3):
        grad_of = dq if part == 0 else (dk if part == 1 else dv)
        at = row * (4 * D) + part * D + channel
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_of + row * D + channel, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(value)
        tl.store(dx + at, (grad * gate * (1 + value * (1 - gate))).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def token_squares(o, sums, tokens, C: tl.constexpr, BLOCK: tl.constexpr):
    """sums [tokens] fp32: this rank's share of each token's sum of squares. Grid tokens."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    value = tl.load(o + token * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(sums + token, tl.sum(value * value, 0))


@triton.jit
def norm_gate(
    o, x, weight, sums, y, eps, channels, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """y [tokens, C] from o [tokens, C] and the gate in x; ``sums`` is read if GIVEN, else written. Grid tokens.

    ``channels``: those of all ranks, by which the sum of squares is divided.
    """
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    value = tl.load(o + token * C + c, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + token * (4 * C) + c // D * (4 * D) + 3 * D + c % D, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        squares = tl.load(sums + token)
    else:
        squares = tl.sum(value * value, 0)
        tl.store(sums + token, squares)
    out = value * (1 / tl.sqrt(squares / channels + eps)) * scale * tl.sigmoid(gate)
    tl.store(y + token * C + c, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_gate_dots(o, x, weight, sums, dy, dots, eps, channels, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """dots [tokens] fp32: this rank's share of sum(dn * n), n the normalised o and dn its gradient. Grid tokens."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    n = tl.load(o + token * C + c, mask=inside, other=0.0).to(tl.float32)
    n = n * (1 / tl.sqrt(tl.load(sums + token) / channels + eps))
    gate = tl.load(x + token * (4 * C) + c // D * (4 * D) + 3 * D + c % D, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + token * C + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(dots + token, tl.sum(grad * tl.sigmoid(gate) * scale * n, 0))


@triton.jit
def norm_gate_backward(
    o, x, weight, sums, dots, dy, do, dx, dweight, tokens, eps, channels,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """do [tokens, C], the gate's rows of dx, and dweight [programs, C] fp32, to be summed. Each program strides tokens.

    ``dots`` is read if GIVEN: the channels of other ranks count too.
    """
    c = tl.arange(0, BLOCK)
    inside = c < C
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    gate_at = c // D * (4 * D) + 3 * D + c % D
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        rstd = 1 / tl.sqrt(tl.load(sums + token) / channels + eps)
        n = tl.load(o + token * C + c, mask=inside, other=0.0).to(tl.float32) * rstd
        gate = tl.sigmoid(tl.load(x + token * (4 * C) + gate_at, mask=inside, other=0.0).to(tl.float32))
        grad = tl.load(dy + token * C + c, mask=inside, other=0.0).to(tl.float32)
        gated = grad * gate
        total += gated * n
        dn = gated * scale
        if GIVEN:
            dot = tl.load(dots + token)
        else:
            dot = tl.sum(dn * n, 0)
        dgate = dn * n * (1 - gate)
        tl.store(dx + token * (4 * C) + gate_at, dgate.to(dx.dtype.element_ty), mask=inside)
        tl.store(do + token * C + c, (rstd * (dn - n * (dot / channels))).to(do.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * C + c, total, mask=inside)
