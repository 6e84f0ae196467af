"""The arithmetic of a decoder layer: two sublayers with post-norm residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m1_stages.model.norms import RMSNorm


def post_norm_layer(
    hidden_states: Tensor,
    *,
    attn_norm: RMSNorm,
    attention: Callable[[Tensor], tuple[Tensor, Any]],
    mlp_norm: RMSNorm,
    experts: Callable[[Tensor], tuple[Tensor, Any]],
    alpha: float,
    beta: float,
) -> Tensor:
    """Compute ``x = norm(h)``, ``y = norm(alpha x + beta attention(x))`` and return ``alpha y + beta experts(y)``.

    The residual is what the norm returned: DeepNorm, post-norm. Source: transformers ``modeling_minimax.py``,
    ``MiniMaxDecoderLayer``. It is a pure function of one tensor, so it can be recomputed in the backward pass.

    Args:
        hidden_states: [this rank's tokens, 1, hidden].
        attention: maps the normed states to an output of the same shape, and a bias that is not used.
        experts: the same for the mixture of experts.
        alpha: weight of the residuals.
        beta: weight of the sublayers' outputs.
    """
    x = attn_norm(hidden_states)
    y = mlp_norm.of_sum(x, attention(x)[0], alpha, beta)
    return torch.add(beta * experts(y)[0] if beta != 1.0 else experts(y)[0], y, alpha=alpha)
