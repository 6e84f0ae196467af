"""The experts' sublayer of a post-norm layer, from the norm before the router to the norm behind the experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m1_kernels.moe.local_experts import FEW_SLOTS, fp32_logits, mix_local_experts, route
from m1_kernels.norm.rms_norm import add_rms_norm
from m1_kernels.triton_support import takes_triton


@torch.no_grad()
def norm_and_route(
    x: Tensor, y: Tensor, norm_weight: Tensor, router_weight: Tensor, k: int, *, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the norm of a residual sum, and the experts of every token. For few tokens one kernel on a CUDA device.

    Args:
        x, y: [T, h] residual and output of the attention.
        norm_weight: [h].
        router_weight: [E, h], any floating dtype.
        k: experts of a token.
        eps, alpha, beta: as for ``add_rms_norm``.

    Returns:
        ``n = rmsnorm(alpha x + beta y) * norm_weight`` [T, h] in x's dtype, and what ``route`` returns for the fp32 products
        of ``n`` with the router's rows: weights [T, k] fp32 and experts [T, k] int64.
    """
    if takes_triton(x) and x.shape[0] * k <= FEW_SLOTS:
        from m1_kernels.decode.post_norm_triton import norm_and_route_triton

        return norm_and_route_triton(x, y, norm_weight, router_weight, k, alpha, beta, eps)
    n = add_rms_norm(x, y, norm_weight, eps=eps, alpha=alpha, beta=beta)
    return n, *route(fp32_logits(n, router_weight), k)


@torch.no_grad()
def mix_and_norm(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    index: Tensor,
    norm_weight: Tensor,
    *,
    first: int,
    num_experts: int,
    eps: float,
    alpha: float,
    beta: float,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute ``rmsnorm(alpha x + beta y) * norm_weight`` with ``y`` the mixture of the tokens' experts.

    Args:
        x, w13, w2, weights, index, first, num_experts: as for ``mix_local_experts``.
        norm_weight: [h], of the norm behind the sublayer.
        eps, alpha, beta: as for ``add_rms_norm``.
        add_up: adds up the shares [T, h] of the ranks that have the experts; None: this rank has all of them.

    Returns:
        [T, h] in x's dtype.
    """
    if add_up is None and takes_triton(x) and index.numel() <= FEW_SLOTS:
        from m1_kernels.decode.post_norm_triton import sum_and_norm_triton
        from m1_kernels.moe.decode_triton import expert_rows_triton

        rows = expert_rows_triton(x, w13, w2, weights, index, first)
        return sum_and_norm_triton(rows, x, norm_weight, alpha, beta, eps)
    y = mix_local_experts(x, w13, w2, weights, index, first=first, num_experts=num_experts)
    if add_up is not None:
        y = add_up(y)
    return add_rms_norm(x, y, norm_weight, eps=eps, alpha=alpha, beta=beta)
