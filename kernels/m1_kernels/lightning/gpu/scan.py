"""Triton kernels of the two-level scan: local states, their combination, and one sweep per (segment, head).

All four sums of lightning attention, its output and three gradients, are one operation on (a, b, c):

    forward in time    out_i = sum_{j <= i} w^(i-j) (a_i . b_j) c_j      o: (q, k, v)      dq: (do, v, k)
    backward in time   out_i = sum_{j >= i} w^(j-i) (a_i . b_j) c_j      dv: (k, q, do)    dk: (v, do, q)

with ``w = exp(log_decay)``; the state is the decayed sum of ``b_j^T c_j``, [K, V] fp32. Forward in time it is S, backward
in time dS; for dq and dk transposed. Segments are cut at multiples of the chunk from a document's start, so only a
document's last chunk is shorter; it is masked, full chunks are not. Token offsets travel through tensor descriptors or are
64-bit, because tokens x heads x channels passes 2^31 at 256K tokens of 64 heads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _decays(ld, n, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Factors of a chunk of n tokens: [BT, BT] between tokens, [BT] to the output, [BT] into the state; ld in log2."""
    i = tl.arange(0, BT)
    distance = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    between = tl.where(distance >= 0, tl.exp2(ld * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    to_out = tl.exp2(ld * tl.maximum(n - 1 - i if REVERSE else i + 1, 0).to(tl.float32))
    to_state = tl.exp2(ld * tl.maximum(i + 1 if REVERSE else n - 1 - i, 0).to(tl.float32))
    return between, to_out, to_state


@triton.jit
def _tail(desc, at, col, n, BT: tl.constexpr):
    """A chunk's first n rows; the others, another document's, as zeros: 0 x infinity must not happen in a product."""
    return tl.where(tl.arange(0, BT)[:, None] < n, desc.load([at, col]), 0.0).to(desc.dtype)


@triton.jit
def _add_state(state, b, c, to_state, decay, PRECISION: tl.constexpr):
    scaled = (c * to_state[:, None]).to(c.dtype)
    return tl.dot(tl.trans(b), scaled, state * decay, input_precision=PRECISION)


@triton.jit
def _chunk(a, b, c, state, between, to_out, PRECISION: tl.constexpr):
    """The chunk's rows of the output, fp32."""
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * between
    out = tl.dot(a, state.to(a.dtype), input_precision=PRECISION) * to_out[:, None]
    return tl.dot(scores.to(c.dtype), c, out, input_precision=PRECISION)


@triton.jit
def local_states(
    b_desc,
    c_desc,
    b_head,
    c_head,
    log_decay,
    pieces,
    states,
    window,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State that each piece adds by its own end (start if REVERSE), reading only tokens that still count there.

    ``pieces`` [pieces, 4] int32: start token, tokens, tokens of its segment after it, before it.
    ``states`` [pieces, H, K, V] fp32. Grid pieces x H x (V / BV), last fastest.
    """
    parts: tl.constexpr = V // BV
    program = tl.program_id(0)
    col = program % parts * BV
    head = program // parts % H
    piece = program // parts // H
    start = tl.load(pieces + piece * 4)
    length = tl.load(pieces + piece * 4 + 1)
    behind = tl.load(pieces + piece * 4 + (3 if REVERSE else 2))
    ld = tl.load(log_decay + head) * 1.4426950408889634
    reach = tl.minimum(window / tl.maximum(-ld, 1e-30), 2.0e9).to(tl.int32) - behind
    if reach > 0:
        n_full = length // BT
        tail = length - n_full * BT
        b_col = head * b_head
        c_col = head * c_head + col
        state = tl.zeros([K, BV], dtype=tl.float32)
        if REVERSE:
            chunks = (tl.minimum(reach, length) + BT - 1) // BT
            last = tl.minimum(chunks, n_full)
            if (tail > 0) & (chunks > n_full):
                at = start + n_full * BT
                _m, _o, to_state = _decays(ld, tail, BT, REVERSE)
                b = _tail(b_desc, at, b_col, tail, BT)
                c = _tail(c_desc, at, c_col, tail, BT)
                state = _add_state(state, b, c, to_state, 0.0, PRECISION)
            _m, _o, to_state = _decays(ld, BT, BT, REVERSE)
            decay = tl.exp2(ld * BT)
            for n in tl.range(0, last, num_stages=STAGES):
                at = start + (last - 1 - n) * BT
                state = _add_state(
                    state, b_desc.load([at, b_col]), c_desc.load([at, c_col]), to_state, decay, PRECISION
                )
        else:
            first = tl.maximum(length - reach, 0) // BT
            _m, _o, to_state = _decays(ld, BT, BT, REVERSE)
            decay = tl.exp2(ld * BT)
            for n in tl.range(first, n_full, num_stages=STAGES):
                at = start + n * BT
                state = _add_state(
                    state, b_desc.load([at, b_col]), c_desc.load([at, c_col]), to_state, decay, PRECISION
                )
            if tail > 0:
                at = start + n_full * BT
                _m, _o, to_state = _decays(ld, tail, BT, REVERSE)
                b = _tail(b_desc, at, b_col, tail, BT)
                c = _tail(c_desc, at, c_col, tail, BT)
                state = _add_state(state, b, c, to_state, tl.exp2(ld * tail), PRECISION)
        base = states + (tl.cast(piece, tl.int64) * H + head) * (K * V)
        tl.store(base + tl.arange(0, K)[:, None] * V + col + tl.arange(0, BV)[None, :], state)


@triton.jit
def combine_states(
    local,
    entering,
    initial,
    final,
    log_decay,
    pieces,
    segments,
    chains,
    window,
    H,
    KV: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):
    """State entering every segment, from the pieces' states; and the state that leaves each document.

    ``segments`` [segments, 6] int32: start token, tokens, first piece, pieces, row of ``entering`` forward, backward in
    time (-1: starts from zeros). With initial states every segment has the row of its own number.
    ``chains`` [documents here, 3] int32: first segment, end, document. ``local`` [pieces, H, KV], ``entering``
    [rows, H, KV], ``initial`` and ``final`` [documents, H, KV], all fp32. Pieces whose tokens have all decayed were
    never written and are not read. Grid chains x H x (KV / BLOCK), last fastest.
    """
    parts: tl.constexpr = KV // BLOCK
    program = tl.program_id(0)
    at = program % parts * BLOCK + tl.arange(0, BLOCK)
    head = program // parts % H
    chain = chains + program // parts // H * 3
    ld = tl.load(log_decay + head) * 1.4426950408889634
    limit = tl.minimum(window / tl.maximum(-ld, 1e-30), 2.0e9).to(tl.int32)
    first = tl.load(chain)
    end = tl.load(chain + 1)
    doc = tl.load(chain + 2)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + (tl.cast(doc, tl.int64) * H + head) * KV + at)
    for n in range(first, end):
        seg = end - 1 - (n - first) if REVERSE else n
        row = segments + seg * 6
        to = tl.cast(seg, tl.int64) if HAS_INITIAL else tl.load(row + (5 if REVERSE else 4)).to(tl.int64)
        if to >= 0:
            tl.store(entering + (to * H + head) * KV + at, state)
        if HAS_FINAL or n + 1 < end:
            state = state * tl.exp2(ld * tl.load(row + 1))
            first_piece = tl.load(row + 2)
            for piece in range(first_piece, first_piece + tl.load(row + 3)):
                behind = tl.load(pieces + piece * 4 + (3 if REVERSE else 2))
                if behind < limit:
                    part = tl.load(local + (tl.cast(piece, tl.int64) * H + head) * KV + at)
                    state += part * tl.exp2(ld * behind)
    if HAS_FINAL:
        tl.store(final + (tl.cast(doc, tl.int64) * H + head) * KV + at, state)


@triton.jit
def sweep(
    a_desc,
    b_desc,
    c_desc,
    o_desc,
    o_ptr,
    a_head,
    b_head,
    c_head,
    o_head,
    o_row,
    log_decay,
    segments,
    order,
    entering,
    H,
    s_k,
    s_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One segment of one head and BV columns: outputs chunk by chunk with the state on chip.

    ``order`` [segments] int32: longest first. ``s_k``, ``s_v``: strides of a state, so that it can be read transposed.
    Grid segments x H x (V / BV), last fastest: programs that read the same tokens run together.
    """
    parts: tl.constexpr = V // BV
    program = tl.program_id(0)
    col = program % parts * BV
    head = program // parts % H
    seg = tl.load(order + program // parts // H)
    start = tl.load(segments + seg * 6)
    length = tl.load(segments + seg * 6 + 1)
    n_full = length // BT
    tail = length - n_full * BT
    ld = tl.load(log_decay + head) * 1.4426950408889634
    a_col = head * a_head
    b_col = head * b_head
    c_col = head * c_head + col
    o_col = head * o_head + col
    row = tl.cast(seg, tl.int64) if HAS_INITIAL else tl.load(segments + seg * 6 + (5 if REVERSE else 4)).to(tl.int64)
    state = tl.zeros([K, BV], dtype=tl.float32)
    if row >= 0:
        state_at = entering + (row * H + head) * (K * V)
        state = tl.load(state_at + tl.arange(0, K)[:, None] * s_k + (col + tl.arange(0, BV))[None, :] * s_v)
    rows = tl.arange(0, BT)
    tail_at = start + n_full * BT
    tail_out = o_ptr + (tail_at + rows).to(tl.int64)[:, None] * o_row + o_col + tl.arange(0, BV)[None, :]
    if REVERSE:
        if tail > 0:
            between, to_out, to_state = _decays(ld, tail, BT, REVERSE)
            a = _tail(a_desc, tail_at, a_col, tail, BT)
            b = _tail(b_desc, tail_at, b_col, tail, BT)
            c = _tail(c_desc, tail_at, c_col, tail, BT)
            out = _chunk(a, b, c, state, between, to_out, PRECISION)
            tl.store(tail_out, out.to(o_ptr.dtype.element_ty), mask=rows[:, None] < tail)
            state = _add_state(state, b, c, to_state, tl.exp2(ld * tail), PRECISION)
    between, to_out, to_state = _decays(ld, BT, BT, REVERSE)
    decay = tl.exp2(ld * BT)
    for n in tl.range(0, n_full, num_stages=STAGES):
        at = start + (n_full - 1 - n if REVERSE else n) * BT
        a = a_desc.load([at, a_col])
        b = b_desc.load([at, b_col])
        c = c_desc.load([at, c_col])
        out = _chunk(a, b, c, state, between, to_out, PRECISION)
        o_desc.store([at, o_col], out.to(o_desc.dtype))
        state = _add_state(state, b, c, to_state, decay, PRECISION)
    if not REVERSE:
        if tail > 0:
            between, to_out, to_state = _decays(ld, tail, BT, REVERSE)
            a = _tail(a_desc, tail_at, a_col, tail, BT)
            b = _tail(b_desc, tail_at, b_col, tail, BT)
            c = _tail(c_desc, tail_at, c_col, tail, BT)
            out = _chunk(a, b, c, state, between, to_out, PRECISION)
            tl.store(tail_out, out.to(o_ptr.dtype.element_ty), mask=rows[:, None] < tail)
