"""Megatron-Core's optimizer, built from our configuration and stepped with a decision in between."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from m1_stages.config import OptimConfig


def build_optimizer(chunks: list[nn.Module], optim: OptimConfig, *, bf16: bool, distributed: bool) -> Any:
    """AdamW over DDP-wrapped ``chunks``: dense and expert parameters are chained, vectors have no weight decay.

    The learning rate is set before every step (``set_learning_rate``), so no scheduler state exists.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=1.0,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set ``lr`` on every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class ReadyGradients:
    """Reduced gradients of one step: look at ``norm``, then ``apply`` them or drop them."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._overflow = bool(optimizer.prepare_grads())
        self.norm = float(optimizer.get_grad_norm())

    @property
    def finite(self) -> bool:
        """Whether an update from these gradients would be finite."""
        return not self._overflow and math.isfinite(self.norm)

    def apply(self) -> None:
        """Clip by the global norm and update the parameters (``ChainedOptimizer.step`` without its norm pass)."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            parameters = part.get_parameters()
            if part.config.clip_grad > 0.0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=self.norm)
        self._optimizer.step_with_ready_grads()
