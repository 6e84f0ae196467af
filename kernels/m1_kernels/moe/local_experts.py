"""A token's experts among those of this rank, for generation: nothing waits for the host on a CUDA device. No gradient flows.

The ranks of an expert-parallel group hold the same tokens. Each computes its own experts' share of the mixture, and the sum of
the shares over the group is the mixture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m1_kernels.moe.experts import choose_expert_backend, expert_order, expert_product, mix_experts, swiglu
from m1_kernels.triton_support import takes_triton

FEW_SLOTS = 1024
"""Up to as many slots (tokens times experts of each) every expert looks for its rows itself, without sorting them."""


def fp32_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` [T, E] in fp32, of x [T, h] and weight [E, h] in any floating dtypes."""
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(x, weight.T, out_dtype=torch.float32)  # products of bf16 numbers are exact in fp32
    return x.float() @ weight.float().T


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the ``k`` likeliest experts of each token.

    Args:
        logits: [T, E] fp32.

    Returns:
        The softmax over all experts at the chosen ones, divided by their sum, [T, k] fp32, and the experts [T, k] int64.
    """
    if takes_triton(logits):
        from m1_kernels.moe.decode_triton import route_triton

        return route_triton(logits, k)
    top, index = torch.softmax(logits, dim=-1).topk(k, dim=-1)
    return top / top.sum(-1, keepdim=True), index


@torch.no_grad()
def mix_local_experts(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, *, first: int, num_experts: int
) -> Tensor:
    """Compute the share of this rank's experts in the mixture of every token.

    Args:
        x: [T, h].
        w13: [experts here, 2, I, h], parts w1 (gate) and w3 (up), x's dtype.
        w2: [experts here, h, I], x's dtype.
        weights: [T, k] fp32 combine weights.
        index: [T, k] int64 expert of each slot, numbered over all ranks.
        first: number of this rank's first expert.
        num_experts: experts of all ranks together.

    Returns:
        [T, h] in x's dtype; zeros for a token without an expert here.
    """
    if takes_triton(x) and index.numel() <= FEW_SLOTS:
        from m1_kernels.moe.decode_triton import mix_few_triton

        return mix_few_triton(x, w13, w2, weights, index, first)
    experts = w13.shape[0]
    if experts == num_experts:
        return mix_experts(x, w13, w2, weights, index, keep=False)
    local = index - first
    here = (local >= 0) & (local < experts)
    if (
        choose_expert_backend(x.device, x.dtype).name == "grouped-mm"
    ):  # other ranks' rows are sorted behind the last expert
        order = expert_order(torch.where(here, local, experts), experts)
        rows = x.index_select(0, order.token)
        gate_up = expert_product(rows, w13.flatten(1, 2).transpose(1, 2), order.ends)
        inner = swiglu(gate_up, weights.reshape(-1)[order.slot])
        out = expert_product(inner, w2.transpose(1, 2), order.ends)
        out = torch.where(here.view(-1)[order.slot, None], out, 0)  # rows behind the last end hold anything
        return out[order.place].sum(1)
    token, slot = here.nonzero().unbind(1)
    parts = mix_experts(x[token], w13, w2, weights[token, slot, None], local[token, slot, None], keep=False)
    return torch.zeros_like(x).index_add_(0, token, parts)
