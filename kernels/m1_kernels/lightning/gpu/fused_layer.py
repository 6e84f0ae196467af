"""The lightning layer between its two projections as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.lightning.gpu.elementwise import (
    norm_gate,
    norm_gate_backward,
    norm_gate_dots,
    split_silu,
    split_silu_backward,
    token_squares,
)
from m1_kernels.lightning.gpu.launch import addressable, config_for, plan_for, run_backward, run_sweep, states
from m1_kernels.lightning.zigzag import ContextShards
from m1_kernels.overlap import overlap

SILU_ROWS, SILU_WARPS = 16, 4  # measured: at the copy rate
BACKWARD_PROGRAMS_PER_PROCESSOR = 2


def split_parts(x: Tensor) -> Tensor:
    """[tokens, H, 4, D] to q, k, v after SiLU: [3, tokens, H, D]."""
    tokens, heads, _, dim = x.shape
    qkv = x.new_empty(3, tokens, heads, dim)
    rows = tokens * heads
    split_silu[(triton.cdiv(rows, SILU_ROWS),)](x, *qkv, rows, D=dim, ROWS=SILU_ROWS, num_warps=SILU_WARPS)
    return qkv


def gated_norm_triton(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """``out`` [tokens, H, D] and the gate in x [tokens, H, 4, D] to y [tokens, H * D] and the tokens' sums of squares."""
    tokens, heads, _, dim = x.shape
    width = heads * dim
    block = triton.next_power_of_2(width)
    sums = torch.empty(tokens, dtype=torch.float32, device=x.device)
    ranks = 1 if tp_group is None else tp_group.size()
    if ranks > 1:
        token_squares[(tokens,)](out, sums, tokens, C=width, BLOCK=block, num_warps=8)
        dist.all_reduce(sums, group=tp_group)
    y = x.new_empty(tokens, width)
    norm_gate[(tokens,)](
        out, x, weight, sums, y, eps, width * ranks, C=width, D=dim, BLOCK=block, GIVEN=ranks > 1, num_warps=8,
        **overlap(x.device),
    )  # fmt: skip
    return y, sums


class _LightningLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        log_decay: Tensor,
        doc_lengths: tuple[int, ...],
        eps: float,
        tp_group: dist.ProcessGroup | None,
        shards: ContextShards | None,
    ) -> Tensor:
        x = x.contiguous()
        q, k, v = split_parts(x)
        cfg = config_for(q, v)
        plan = plan_for(doc_lengths, q, cfg, False, shards)
        entering, _ = states(k, v, log_decay, plan, cfg, reverse=False, shards=shards)
        out = torch.empty_like(q)
        common = (log_decay, plan, cfg, entering)
        run_sweep(q, k, v, out, *common, transposed=False, reverse=False, has_initial=False)
        y, sums = gated_norm_triton(out, x, weight, eps, tp_group)
        ctx.save_for_backward(x, weight, log_decay, entering, out, sums)
        ctx.settings = (doc_lengths, eps, tp_group, 1 if tp_group is None else tp_group.size(), shards)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, log_decay, entering, out, sums = ctx.saved_tensors
        doc_lengths, eps, tp_group, ranks, shards = ctx.settings
        tokens, heads, _, dim = x.shape
        width = heads * dim
        block = triton.next_power_of_2(width)
        dy = grads[0].contiguous()
        dots = torch.empty_like(sums)
        sizes = {"C": width, "D": dim, "BLOCK": block, "num_warps": 16}
        if ranks > 1:
            norm_gate_dots[(tokens,)](out, x, weight, sums, dy, dots, eps, width * ranks, **sizes)
            dist.all_reduce(dots, group=tp_group)
        dx, do = torch.empty_like(x), torch.empty_like(out)
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        programs = min(tokens, BACKWARD_PROGRAMS_PER_PROCESSOR * processors)
        dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        norm_gate_backward[(programs,)](
            out, x, weight, sums, dots, dy, do, dx, dweight, tokens, eps, width * ranks, GIVEN=ranks > 1, **sizes
        )
        q, k, v = split_parts(x)
        cfg = config_for(q, v)
        plan = plan_for(doc_lengths, q, cfg, False, shards)
        do = addressable(do)
        after, _ = states(q, do, log_decay, plan, cfg, reverse=True, shards=shards)
        grads_qkv = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
        common = (log_decay, plan, cfg, entering, after)
        run_backward(q, k, v, do, grads_qkv.unbind(), *common, has_initial=False, has_final=False)
        rows = tokens * heads
        split_silu_backward[(triton.cdiv(rows, SILU_ROWS),)](
            x, *grads_qkv, dx, rows, D=dim, ROWS=SILU_ROWS, num_warps=SILU_WARPS
        )
        return dx, dweight.sum(0).to(weight.dtype), None, None, None, None, None


def lightning_layer_triton(
    x: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    doc_lengths: tuple[int, ...],
    eps: float,
    tp_group: dist.ProcessGroup | None,
    shards: ContextShards | None,
) -> Tensor:
    """x [tokens, H, 4, D] with parts q, k, v, gate; weight [H * D]; returns [tokens, H * D]."""
    decay = log_decay.float().contiguous()
    result: Tensor = _LightningLayer.apply(x, weight, decay, doc_lengths, eps, tp_group, shards)
    return result
