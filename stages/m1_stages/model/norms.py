"""RMSNorm for sequence-parallel and for head-sharded activations."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from m1_kernels import add_rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the hidden size, in fp32, result in x's dtype.

    Under sequence parallelism each rank sees a share of the tokens, so the weight's gradient is summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return add_rms_norm(x, None, self.weight, eps=self.eps)

    def of_sum(self, x: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
        """Return the norm of ``alpha x + beta y``, [..., hidden]; the sum is not rounded before."""
        return add_rms_norm(x, y, self.weight, eps=self.eps, alpha=alpha, beta=beta)


class HeadShardedRMSNorm(nn.Module):
    """RMSNorm over all heads' channels when each tensor-parallel rank holds some of the heads.

    The sum of squares is reduced over the ranks in the forward pass, its gradient in the backward pass.
    """

    def __init__(self, config: TransformerConfig, local_size: int, global_size: int, eps: float, tp_group: Any) -> None:
        super().__init__()
        self.eps, self.global_size, self.tp_group = eps, global_size, tp_group
        self.weight = nn.Parameter(torch.ones(local_size, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        squares = y.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        y = y * torch.rsqrt(squares / self.global_size + self.eps)
        return (self.weight.float() * y).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight is sharded with the heads."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return state
