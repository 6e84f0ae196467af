"""The sweep of ``scan.py`` written out for Hopper in Gluon: same arguments, same sums, explicit pipeline.

Two thread blocks share a multiprocessor, each 4 warps, 64 columns of the state in registers. Per chunk of 64 tokens:
loads run one chunk ahead through two buffers; scores and the state's share start together on the tensor cores while the
other units scale c for the state update; the output leaves through the copy engine. A block's chain of dependent steps
is hidden by the other block. The plain Triton sweep starts a load only when its buffer's chunk is done (kernels/README.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load(a_desc, b_desc, c_desc, at, a_col, b_col, c_col, bars, a_buf, b_buf, c_buf, slot, pred):
    bar = bars.index(slot)
    size: gl.constexpr = a_desc.block_type.nbytes + b_desc.block_type.nbytes + c_desc.block_type.nbytes
    mbarrier.expect(bar, size, pred=pred)
    tma.async_copy_global_to_shared(a_desc, [at, a_col], bar, a_buf.index(slot), pred=pred)
    tma.async_copy_global_to_shared(b_desc, [at, b_col], bar, b_buf.index(slot), pred=pred)
    tma.async_copy_global_to_shared(c_desc, [at, c_col], bar, c_buf.index(slot), pred=pred)


@gluon.jit
def _segment(
    a_desc,
    b_desc,
    c_desc,
    o_desc,
    o_ptr,
    a_col,
    b_col,
    c_col,
    o_col,
    o_row,
    start,
    length,
    ld,
    state_at,
    has_state,
    s_k,
    s_v,
    K: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    REVERSE: gl.constexpr,
):
    dtype: gl.constexpr = a_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    MMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [4, 1], [1, 0])
    COPY_B: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])

    a_buf = gl.allocate_shared_memory(dtype, [2, BT, K], a_desc.layout)
    b_buf = gl.allocate_shared_memory(dtype, [2, BT, K], b_desc.layout)
    c_buf = gl.allocate_shared_memory(dtype, [2, BT, BV], c_desc.layout)
    scaled = gl.allocate_shared_memory(dtype, [BT, BV], c_desc.layout)
    o_buf = gl.allocate_shared_memory(dtype, [BT, BV], o_desc.layout)
    s_buf = gl.allocate_shared_memory(dtype, [K, BV], c_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    fence_async_shared()

    chunks = (length + BT - 1) // BT
    for n in gl.static_range(2):
        pos = chunks - 1 - n if REVERSE else n
        _load(a_desc, b_desc, c_desc, start + pos * BT, a_col, b_col, c_col, bars, a_buf, b_buf, c_buf, n, n < chunks)

    i = gl.arange(0, BT, layout=gl.SliceLayout(1, MMS))
    j = gl.arange(0, BT, layout=gl.SliceLayout(0, MMS))
    distance = j[None, :] - i[:, None] if REVERSE else i[:, None] - j[None, :]
    between = gl.where(distance >= 0, gl.exp2(ld * gl.maximum(distance, 0).to(gl.float32)), 0.0)

    rows = gl.arange(0, K, layout=gl.SliceLayout(1, MMA))
    cols = gl.arange(0, BV, layout=gl.SliceLayout(0, MMA))
    state = gl.load(
        state_at + rows[:, None] * s_k + cols[None, :] * s_v, mask=(rows[:, None] >= 0) & has_state, other=0.0
    )
    s_buf.store(state.to(dtype))
    fence_async_shared()
    t_out = gl.arange(0, BT, layout=gl.SliceLayout(1, MMA))
    t_copy = gl.arange(0, BT, layout=gl.SliceLayout(1, COPY))
    t_b = gl.arange(0, BT, layout=gl.SliceLayout(1, COPY_B))
    no_scores = gl.zeros([BT, BT], gl.float32, layout=MMS)
    no_out = gl.zeros([BT, BV], gl.float32, layout=MMA)

    for n in range(chunks):
        pos = chunks - 1 - n if REVERSE else n
        at = start + pos * BT
        m = gl.minimum(length - pos * BT, BT)
        slot = n & 1
        a = a_buf.index(slot)
        b = b_buf.index(slot)
        c = c_buf.index(slot)
        mbarrier.wait(bars.index(slot), (n >> 1) & 1)
        c_reg = c.load(COPY)
        if m < BT:  # rows of the next document must not reach a product, not even as 0 x infinity
            c_reg = gl.where(t_copy[:, None] < m, c_reg, 0.0)
            c.store(c_reg)
            b_reg = b.load(COPY_B)
            b.store(gl.where(t_b[:, None] < m, b_reg, 0.0))
            fence_async_shared()
        scores = warpgroup_mma(a, b.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        out = warpgroup_mma(a, s_buf, no_out, use_acc=False, is_async=True)
        to_state = gl.exp2(ld * gl.maximum(t_copy + 1 if REVERSE else m - 1 - t_copy, 0).to(gl.float32))
        scaled.store((c_reg.to(gl.float32) * to_state[:, None]).to(dtype))
        fence_async_shared()
        scores = warpgroup_mma_wait(1, [scores])
        p = gl.convert_layout((scores * between).to(dtype), gl.DotOperandLayout(0, MMA, 2))
        out = warpgroup_mma_wait(0, [out])
        to_out = gl.exp2(ld * gl.maximum(m - 1 - t_out if REVERSE else t_out + 1, 0).to(gl.float32))
        out = warpgroup_mma(p, c, out * to_out[:, None], is_async=True)
        decay = gl.exp2(ld * m.to(gl.float32))
        state = warpgroup_mma(b.permute((1, 0)), scaled, state * decay, is_async=True)
        out = warpgroup_mma_wait(1, [out])
        if m == BT:
            tma.store_wait(0)
            o_buf.store(out.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [at, o_col], o_buf)
        else:
            to = o_ptr + (at + t_out).to(gl.int64)[:, None] * o_row + o_col + cols[None, :]
            gl.store(to, out.to(dtype), mask=t_out[:, None] < m)
        state = warpgroup_mma_wait(0, [state])
        s_buf.store(state.to(dtype))
        fence_async_shared()
        ahead = pos - 2 if REVERSE else pos + 2
        _load(
            a_desc,
            b_desc,
            c_desc,
            start + ahead * BT,
            a_col,
            b_col,
            c_col,
            bars,
            a_buf,
            b_buf,
            c_buf,
            slot,
            n + 2 < chunks,
        )
    tma.store_wait(0)
    mbarrier.invalidate(bars.index(0))
    mbarrier.invalidate(bars.index(1))


@gluon.jit
def _where(program, parts: gl.constexpr, H, order, segments, REVERSE: gl.constexpr, HAS_INITIAL: gl.constexpr):
    """Part, head, start token, tokens and state row (-1: zeros) of a program."""
    head = program // parts % H
    seg = gl.load(order + program // parts // H)
    row = seg if HAS_INITIAL else gl.load(segments + seg * 6 + (5 if REVERSE else 4))
    return program % parts, head, gl.load(segments + seg * 6), gl.load(segments + seg * 6 + 1), row


@gluon.jit
def sweep_hopper(
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
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    REVERSE: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
):
    """``scan.sweep`` for 16-bit inputs, K and V of 64 or 128. Grid segments x H x (V / BV)."""
    part, head, start, length, row = _where(gl.program_id(0), V // BV, H, order, segments, REVERSE, HAS_INITIAL)
    col = part * BV
    ld = gl.load(log_decay + head) * 1.4426950408889634
    state_at = entering + (gl.maximum(row, 0).to(gl.int64) * H + head) * (K * V) + col * s_v
    _segment(
        a_desc,
        b_desc,
        c_desc,
        o_desc,
        o_ptr,
        head * a_head,
        head * b_head,
        head * c_head + col,
        head * o_head + col,
        o_row,
        start,
        length,
        ld,
        state_at,
        row >= 0,
        s_k,
        s_v,
        K,
        BT,
        BV,
        REVERSE,
    )


@gluon.jit
def sweep_pair_hopper(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    q_part,
    do_part,
    dk_desc,
    dv_desc,
    dk_ptr,
    dv_ptr,
    q_head,
    k_head,
    v_head,
    do_head,
    dk_head,
    dv_head,
    dk_row,
    dv_row,
    log_decay,
    segments,
    order,
    entering,
    H,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
):
    """dk and dv in one launch: programs that read the same tokens run side by side and meet in the L2 cache."""
    parts: gl.constexpr = V // BV + K // BV
    part, head, start, length, row = _where(gl.program_id(0), parts, H, order, segments, True, HAS_INITIAL)
    ld = gl.load(log_decay + head) * 1.4426950408889634
    state_at = entering + (gl.maximum(row, 0).to(gl.int64) * H + head) * (K * V)
    if part < V // BV:
        col = part * BV
        _segment(
            k_desc,
            q_desc,
            do_part,
            dv_desc,
            dv_ptr,
            head * k_head,
            head * q_head,
            head * do_head + col,
            head * dv_head + col,
            dv_row,
            start,
            length,
            ld,
            state_at + col,
            row >= 0,
            V,
            1,
            K,
            BT,
            BV,
            True,
        )
    else:
        col = (part - V // BV) * BV
        _segment(
            v_desc,
            do_desc,
            q_part,
            dk_desc,
            dk_ptr,
            head * v_head,
            head * do_head,
            head * q_head + col,
            head * dk_head + col,
            dk_row,
            start,
            length,
            ld,
            state_at + col * V,
            row >= 0,
            1,
            V,
            V,
            BT,
            BV,
            True,
        )
