"""Lightning attention on the Triton kernels: launches, forward and backward, states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from m1_kernels.lightning.gpu.scan import combine_states, local_states, sweep
from m1_kernels.lightning.gpu.segments import SegmentPlan, segment_plan
from m1_kernels.lightning.zigzag import ContextShards

WINDOW_BITS = 25.0  # a term decayed below 2^-25 of the newest one is not read into a state: fp32 sums keep 24 bits


class Tiles(NamedTuple):
    """Block sizes of one launch."""

    chunk: int
    columns: int
    warps: int
    stages: int


class Config(NamedTuple):
    """The launch settings of one call. With ``hopper`` the sweeps are those of ``hopper.py``."""

    states: Tiles
    sweep: Tiles
    precision: str
    hopper: bool
    slots: int
    """(segment, head) programs that the device runs at once."""


def config_for(q: Tensor, v: Tensor) -> Config:
    """The measured choice for these inputs (kernels/README.md)."""
    dims = (q.shape[-1], v.shape[-1])
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    if q.dtype == torch.float32:
        tiles = Tiles(16, min(dims[1], 32), 4, 1)
        return Config(tiles, tiles, "tf32x3", False, processors)
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and set(dims) <= {64, 128}
    states = Tiles(64, dims[1], 8 if max(dims) == 128 else 4, 3)
    return Config(states, Tiles(64, min(*dims, 64), 4, 3), "tf32", hopper, processors * (2 if max(dims) < 128 else 1))


def addressable(x: Tensor) -> Tensor:
    """[tokens, H, D] that a tensor descriptor can address; a copy only of what cannot be: not what a projection returns."""
    align = 16 // x.element_size()
    strides_fit = x.stride(2) == 1 and all(s > 0 and s % align == 0 for s in x.stride()[:2])
    if strides_fit and x.data_ptr() % 16 == 0 and _width(x) < 2**31:
        return x
    return x.contiguous()


def _width(x: Tensor) -> int:
    """Elements from the first to the last channel of a token."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _block(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x.shape[0], _width(x)], [x.stride(0), 1], [rows, cols])


def _hopper_block(x: Tensor, rows: int, cols: int) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], kind)
    return GluonDescriptor(x, [x.shape[0], _width(x)], [x.stride(0), 1], [rows, cols], layout)


def states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    plan: SegmentPlan,
    cfg: Config,
    *,
    reverse: bool,
    initial: Tensor | None = None,
    want_final: bool = False,
    shards: ContextShards | None = None,
) -> tuple[Tensor, Tensor | None]:
    """States that enter the segments, [rows, H, K, V] fp32, and those that leave the documents, [documents, H, K, V].

    With ``shards`` the states of documents that come from other ranks are fetched, and the second result means nothing.
    """
    want_final = want_final or shards is not None
    heads, k_dim, v_dim = b.shape[1], b.shape[2], c.shape[2]
    shape, fp32 = (heads, k_dim, v_dim), torch.float32
    rows = plan.rows if initial is None else plan.segments.shape[0]
    entering = torch.empty((max(rows, 1), *shape), dtype=fp32, device=b.device)
    final = torch.empty((len(plan.chains), *shape), dtype=fp32, device=b.device) if want_final else None
    if len(plan.chains):
        _scan(b, c, log_decay, plan, cfg, reverse, initial, entering, final)
    if shards is not None:
        _carry(entering, final, log_decay, plan, shards, reverse)
    return entering, final


def _scan(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    plan: SegmentPlan,
    cfg: Config,
    reverse: bool,
    initial: Tensor | None,
    entering: Tensor,
    final: Tensor | None,
) -> None:
    heads, k_dim, v_dim = b.shape[1], b.shape[2], c.shape[2]
    shape, fp32 = (heads, k_dim, v_dim), torch.float32
    t = cfg.states
    local = torch.empty((len(plan.pieces), *shape), dtype=fp32, device=b.device)
    local_states[(len(plan.pieces) * heads * (v_dim // t.columns),)](
        _block(b, t.chunk, k_dim),
        _block(c, t.chunk, t.columns),
        b.stride(1),
        c.stride(1),
        log_decay,
        plan.pieces,
        local,
        WINDOW_BITS,
        heads,
        K=k_dim,
        V=v_dim,
        BT=t.chunk,
        BV=t.columns,
        REVERSE=reverse,
        PRECISION=cfg.precision,
        STAGES=t.stages,
        num_warps=t.warps,
    )
    block = min(1024, k_dim * v_dim)
    combine_states[(len(plan.chains) * heads * (k_dim * v_dim // block),)](
        local,
        entering,
        entering if initial is None else initial,
        entering if final is None else final,
        log_decay,
        plan.pieces,
        plan.segments,
        plan.chains,
        WINDOW_BITS,
        heads,
        KV=k_dim * v_dim,
        BLOCK=block,
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final is not None,
        num_warps=4,
    )


def _carry(
    entering: Tensor,
    final: Tensor | None,
    log_decay: Tensor,
    plan: SegmentPlan,
    shards: ContextShards,
    reverse: bool,
) -> None:
    """Exchange states with the other ranks and add what comes to the segments it reaches, decayed."""
    assert final is not None
    carried = plan.carried[reverse]
    local = torch.zeros((len(carried), *entering.shape[1:]), dtype=entering.dtype, device=entering.device)
    for n, carry in enumerate(carried):
        if carry.sends >= 0:
            local[n] = final[carry.sends]
    states = (shards.leaving if reverse else shards.entering)(local, log_decay)
    for state, carry in zip(states, carried, strict=True):
        decay = (log_decay * carry.distance[:, None]).exp()[:, :, None, None]
        entering[carry.rows].addcmul_(decay, state)


def run_sweep(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    log_decay: Tensor,
    plan: SegmentPlan,
    cfg: Config,
    entering: Tensor,
    *,
    transposed: bool,
    reverse: bool,
    has_initial: bool,
) -> None:
    """One of the four sums of ``scan.py`` into ``out``; ``transposed``: the states are read as [V, K]."""
    heads, k_dim, v_dim = a.shape[1], a.shape[2], c.shape[2]
    chunk, columns, warps, stages = cfg.sweep
    columns = min(columns, v_dim)
    kernel, block, more = sweep, _block, {"PRECISION": cfg.precision, "STAGES": stages}
    if cfg.hopper:
        from m1_kernels.lightning.gpu.hopper import sweep_hopper

        kernel, block, more = sweep_hopper, _hopper_block, {}
    kernel[(len(plan.segments) * heads * (v_dim // columns),)](
        block(a, chunk, k_dim),
        block(b, chunk, k_dim),
        block(c, chunk, columns),
        block(out, chunk, columns),
        out,
        *(x.stride(1) for x in (a, b, c, out)),
        out.stride(0),
        log_decay,
        plan.segments,
        plan.order,
        entering,
        heads,
        *((1, k_dim) if transposed else (v_dim, 1)),
        K=k_dim,
        V=v_dim,
        BT=chunk,
        BV=columns,
        REVERSE=reverse,
        HAS_INITIAL=has_initial,
        num_warps=warps,
        **more,
    )


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    grads: Sequence[Tensor],
    log_decay: Tensor,
    plan: SegmentPlan,
    cfg: Config,
    entering: Tensor,
    after: Tensor,
    *,
    has_initial: bool,
    has_final: bool,
) -> None:
    """dq, dk, dv into ``grads``; ``entering``: states before the segments, ``after``: state gradients behind them."""
    dq, dk, dv = grads
    common = (log_decay, plan, cfg)
    run_sweep(do, v, k, dq, *common, entering, transposed=True, reverse=False, has_initial=has_initial)
    if not cfg.hopper:
        run_sweep(k, q, do, dv, *common, after, transposed=False, reverse=True, has_initial=has_final)
        run_sweep(v, do, q, dk, *common, after, transposed=True, reverse=True, has_initial=has_final)
        return
    from m1_kernels.lightning.gpu.hopper import sweep_pair_hopper

    heads, k_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    chunk, columns, warps, _ = cfg.sweep
    inputs, outputs = (q, k, v, do), (dk, dv)
    sweep_pair_hopper[(len(plan.segments) * heads * ((k_dim + v_dim) // columns),)](
        *(_hopper_block(x, chunk, x.shape[2]) for x in inputs),
        *(_hopper_block(x, chunk, columns) for x in (q, do, *outputs)),
        *outputs,
        *(x.stride(1) for x in (*inputs, *outputs)),
        *(x.stride(0) for x in outputs),
        log_decay,
        plan.segments,
        plan.order,
        after,
        heads,
        K=k_dim,
        V=v_dim,
        BT=chunk,
        BV=columns,
        HAS_INITIAL=has_final,
        num_warps=warps,
    )


def plan_for(
    doc_lengths: tuple[int, ...], q: Tensor, cfg: Config, all_states: bool, shards: ContextShards | None
) -> SegmentPlan:
    """The plan of one call; ``all_states``: initial states come in or final ones are wanted."""
    cuts = () if shards is None else shards.my_cuts
    return segment_plan(doc_lengths, q.shape[1], cfg.slots, q.device, all_states, cuts)


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial: Tensor | None,
        doc_lengths: tuple[int, ...],
        want_final: bool,
        shards: ContextShards | None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (addressable(x) for x in (q, k, v))
        cfg = config_for(q, v)
        has_initial = initial is not None
        plan = plan_for(doc_lengths, q, cfg, has_initial or want_final, shards)
        entering, final = states(
            k, v, log_decay, plan, cfg, reverse=False, initial=initial, want_final=want_final, shards=shards
        )
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        run_sweep(
            q, k, v, out, log_decay, plan, cfg, entering, transposed=False, reverse=False, has_initial=has_initial
        )
        ctx.save_for_backward(q, k, v, log_decay, entering)
        ctx.settings = (cfg, doc_lengths, has_initial, shards)
        return out, final if want_final else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, entering = ctx.saved_tensors
        cfg, doc_lengths, has_initial, shards = ctx.settings
        assert grads[0] is not None
        do = addressable(grads[0].to(q.dtype))
        grad_final = None if grads[1] is None else grads[1].contiguous()
        plan = plan_for(doc_lengths, q, cfg, has_initial or grad_final is not None, shards)
        after, grad_initial = states(
            q, do, log_decay, plan, cfg, reverse=True, initial=grad_final, want_final=has_initial, shards=shards
        )
        out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        run_backward(
            q, k, v, do, out, log_decay, plan, cfg, entering, after,
            has_initial=has_initial, has_final=grad_final is not None,
        )  # fmt: skip
        return *out, None, grad_initial if has_initial else None, None, None, None


def lightning_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    doc_lengths: tuple[int, ...],
    initial_state: Tensor | None,
    want_final: bool,
    shards: ContextShards | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Packed [tokens, H, D] inputs; returns o [tokens, H, Dv] in v's dtype and final states [documents, H, Dk, Dv]."""
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    result: tuple[Tensor, Tensor | None] = _Lightning.apply(
        q, k, v, log_decay.float().contiguous(), initial_state, doc_lengths, want_final, shards
    )
    return result
