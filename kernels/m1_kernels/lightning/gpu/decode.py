"""One token of many sequences: the recurrent states are read and written once, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m1_kernels.overlap import overlap, wait_for_previous


@triton.jit
def _step(
    q, k, v, o, state, log_decay, q_row, q_head, k_row, k_head, v_row, v_head, H,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)  # before the states are read: that kernel may be this one, a token before
    parts: tl.constexpr = V // BV
    program = tl.program_id(0)
    head = program // parts % H
    sequence = (program // parts // H).to(tl.int64)
    rows = tl.arange(0, K)
    cols = program % parts * BV + tl.arange(0, BV)
    at = state + (sequence * H + head) * (K * V) + rows[:, None] * V + cols[None, :]
    before = tl.load(at)  # first of all, since it is nearly all that is read
    decay = tl.exp(tl.load(log_decay + head))
    query = tl.load(q + sequence * q_row + head * q_head + rows).to(tl.float32)
    key = tl.load(k + sequence * k_row + head * k_head + rows).to(tl.float32)
    value = tl.load(v + sequence * v_row + head * v_head + cols).to(tl.float32)
    if SILU:
        query, key, value = query * tl.sigmoid(query), key * tl.sigmoid(key), value * tl.sigmoid(value)
    new = before * decay + key[:, None] * value[None, :]
    tl.store(at, new)
    out = tl.sum(query[:, None] * new, 0)
    tl.store(o + (sequence * H + head) * V + cols, out.to(o.dtype.element_ty))


def decode_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, silu: bool = False) -> Tensor:
    """q, k [B, H, K], v [B, H, V], state [B, H, K, V] fp32, changed in place; returns o [B, H, V].

    ``silu``: q, k, v go through SiLU first, in fp32.
    """
    batch, heads, k_dim = q.shape
    v_dim = v.shape[2]
    out = v.new_empty(batch, heads, v_dim)
    columns = min(v_dim, 64)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    _step[(batch * heads * (v_dim // columns),)](
        q, k, v, out, state, log_decay, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], heads,
        K=k_dim, V=v_dim, BV=columns, SILU=silu, num_warps=4, **overlap(q.device),
    )  # fmt: skip
    return out
