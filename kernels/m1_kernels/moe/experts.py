"""Top-k mixture of SwiGLU experts: ``sum_j weight_j * w2_j(silu(w1_j x) * w3_j x)`` over a token's experts j.

Tokens go through in tiles. A tile's rows are sorted by expert, so that each weight meets all of its rows in one grouped
product; what lies between input and output of a tile exists for that tile only and is computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.autocast import without_autocast
from m1_kernels.backend_choice import BackendChoice
from m1_kernels.restoring import recomputing
from m1_kernels.triton_support import takes_triton

TILE_TOKENS = 65_536
"""Enough rows for each of 32 experts to keep a grouped product busy."""


def mix_experts(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, *, keep: bool, tile_tokens: int = TILE_TOKENS
) -> Tensor:
    """Send every token through its experts, all of which are on this rank.

    Args:
        x: [T, h].
        w13: [E, 2, I, h], parts w1 (gate) and w3 (up), x's dtype.
        w2: [E, h, I], x's dtype.
        weights: [T, k] fp32 (fp64 for fp64 inputs) combine weights.
        index: [T, k] int64 expert of each slot.
        keep: keep gate and up ([T k, 2 I]) for the backward instead of computing them again; not inside ``recomputed``.
        tile_tokens: tokens at a time.

    Returns:
        [T, h] in x's dtype. The order of all sums is fixed.
    """
    out: Tensor = _Mixture.apply(x, w13, w2, weights, index, keep, tile_tokens)
    return out


def grouped_experts(rows: Tensor, counts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, *, keep: bool) -> Tensor:
    """Send every row through its expert: rows [M, h] sorted by expert, ``counts`` [E] rows each, combine weights [M]."""
    ends = counts.to(device=rows.device).cumsum(0, dtype=torch.int32)
    out: Tensor = _Grouped.apply(rows, w13, w2, weights, ends, keep)
    return out


class ExpertOrder(NamedTuple):
    token: Tensor
    """[M] token of each sorted row."""
    place: Tensor
    """[T, k] sorted row of each slot."""
    slot: Tensor
    """[M] flat slot of each sorted row."""
    ends: Tensor
    """[E] int32, one past each expert's last row."""


def expert_order(index: Tensor, num_experts: int) -> ExpertOrder:
    keys = index.reshape(-1).to(torch.int16)  # a 64-bit radix sort takes four times as many passes
    by_expert, slot = torch.sort(keys, stable=True)
    experts = torch.arange(num_experts, device=index.device, dtype=torch.int16)
    ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    place = torch.empty_like(slot)
    place[slot] = torch.arange(slot.numel(), device=index.device)
    return ExpertOrder(slot // index.shape[1], place.view(index.shape), slot, ends)


def choose_expert_backend(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """Choose how rows of ``dtype`` on ``device`` meet their experts' weights.

    "grouped-mm" is one product for all experts (``torch.nn.functional.grouped_mm``); "per-expert" is one product each.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return BackendChoice("grouped-mm", "bf16 on a CUDA device: one product for all experts")
    return BackendChoice("per-expert", f"{dtype} on {device.type}: grouped products take bf16 CUDA tensors only")


def _use_grouped_mm(x: Tensor) -> bool:
    return choose_expert_backend(x.device, x.dtype).name == "grouped-mm"


def _lengths(ends: Tensor) -> list[int]:
    edges = [0, *ends.tolist()]
    return [b - a for a, b in pairwise(edges)]


def expert_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [M, K] times weight [E, K, N] of their expert."""
    if _use_grouped_mm(rows):
        return F.grouped_mm(rows, weight, offs=ends)
    parts = zip(rows.split(_lengths(ends)), weight, strict=True)
    return torch.cat([part @ w for part, w in parts])


def _weight_gradient(d_rows: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """[E, N, K] = d_rows^T rows, [M, N] and [M, K], of each expert."""
    if _use_grouped_mm(rows):
        return F.grouped_mm(d_rows.T, rows, offs=ends)
    lengths = _lengths(ends)
    return torch.stack([d.T @ r for d, r in zip(d_rows.split(lengths), rows.split(lengths), strict=True)])


def swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    if takes_triton(gate_up):
        from m1_kernels.moe.experts_triton import swiglu_triton

        return swiglu_triton(gate_up, weight)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weight[:, None].to(gate.dtype)


def _activate_backward(gate_up: Tensor, weight: Tensor, d_inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activation, gradient of ``gate_up``, gradient of ``weight``."""
    if takes_triton(gate_up):
        from m1_kernels.moe.experts_triton import swiglu_backward_triton

        return swiglu_backward_triton(gate_up, weight, d_inner)
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu, scale = gate * sigmoid, weight[:, None].to(gate.dtype)
    d_weight = (d_inner * silu * up).sum(-1).to(weight.dtype)
    d_scaled = d_inner * scale
    d_gate = d_scaled * up * sigmoid * (1 + gate * (1 - sigmoid))
    return silu * up * scale, torch.cat([d_gate, d_scaled * silu], dim=-1), d_weight


def _sum_rows(rows: Tensor, place: Tensor, out: Tensor) -> None:
    if takes_triton(rows):
        from m1_kernels.moe.experts_triton import sum_rows_triton

        sum_rows_triton(rows, place, out)
    else:
        torch.sum(rows[place], dim=1, out=out)


def _backward_rows(
    d_out: Tensor,
    rows: Tensor,
    gate_up: Tensor | None,
    weight: Tensor,
    ends: Tensor,
    w13: Tensor,
    w2: Tensor,
    trained: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of rows [M, h], weight [M], and of w13 [E, 2 I, h] and w2 where these are ``trained``."""
    flat13 = w13.flatten(1, 2)
    if gate_up is None:
        gate_up = expert_product(rows, flat13.transpose(1, 2), ends)
    inner, d_gate_up, d_weight = _activate_backward(gate_up, weight, expert_product(d_out, w2, ends))
    del gate_up
    d_w2 = _weight_gradient(d_out, inner, ends) if trained[1] else None
    del inner
    d_w13 = _weight_gradient(d_gate_up, rows, ends) if trained[0] else None
    return expert_product(d_gate_up, flat13, ends), d_weight, d_w13, d_w2


class _Grouped(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, rows: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ends: Tensor, keep: bool) -> Tensor:
        gate_up = None
        if recomputing():
            out = torch.empty_like(rows)
        else:
            gate_up = expert_product(rows, w13.flatten(1, 2).transpose(1, 2), ends)
            out = expert_product(swiglu(gate_up, weights), w2.transpose(1, 2), ends)
        ctx.save_for_backward(rows, w13, w2, weights, ends, *([gate_up] if keep and gate_up is not None else []))
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, w13, w2, weights, ends, *kept = ctx.saved_tensors
        d_out = grads[0].contiguous()
        trained, gate_up = ctx.needs_input_grad[1:3], kept[0] if kept else None
        d_rows, d_weights, d_w13, d_w2 = _backward_rows(d_out, rows, gate_up, weights, ends, w13, w2, trained)
        return d_rows, None if d_w13 is None else d_w13.view(w13.shape), d_w2, d_weights, None, None


class _Mixture(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, keep: bool, tile_tokens: int
    ) -> Tensor:
        out = torch.empty_like(x)
        kept: list[Tensor] = []
        for start in () if recomputing() else range(0, x.shape[0], tile_tokens):
            tile = slice(start, start + tile_tokens)
            order = expert_order(index[tile], w13.shape[0])
            rows = x[tile].index_select(0, order.token)
            gate_up = expert_product(rows, w13.flatten(1, 2).transpose(1, 2), order.ends)
            del rows
            inner = swiglu(gate_up, weights[tile].reshape(-1)[order.slot])
            if keep:
                kept.append(gate_up)
            del gate_up
            _sum_rows(expert_product(inner, w2.transpose(1, 2), order.ends), order.place, out[tile])
        ctx.save_for_backward(x, w13, w2, weights, index, *kept)
        ctx.tile_tokens = tile_tokens
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, weights, index, *kept = ctx.saved_tensors
        d_out = grads[0].contiguous()
        d_x, d_weights = torch.empty_like(x), torch.empty_like(weights)
        trained = ctx.needs_input_grad[1:3]
        d_w13 = torch.zeros_like(w13) if trained[0] and not len(x) else None
        d_w2 = torch.zeros_like(w2) if trained[1] and not len(x) else None
        for number, start in enumerate(range(0, x.shape[0], ctx.tile_tokens)):
            tile = slice(start, start + ctx.tile_tokens)
            order = expert_order(index[tile], w13.shape[0])
            rows, weight = x[tile].index_select(0, order.token), weights[tile].reshape(-1)[order.slot]
            d_rows, d_weight, part13, part2 = _backward_rows(
                d_out[tile].index_select(0, order.token),
                rows,
                kept[number] if kept else None,
                weight,
                order.ends,
                w13,
                w2,
                trained,
            )
            _sum_rows(d_rows, order.place, d_x[tile])
            d_weights[tile] = d_weight[order.place]
            d_w13, d_w2 = _accumulate(d_w13, part13), _accumulate(d_w2, part2)
        d_w13 = None if d_w13 is None else d_w13.view(w13.shape).to(w13.dtype)
        return d_x, d_w13, None if d_w2 is None else d_w2.to(w2.dtype), d_weights, None, None, None


def _accumulate(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sums over tiles are fp32: bf16 would lose the small ones."""
    return (
        part if total is None or part is None else total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)
    )
