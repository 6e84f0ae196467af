"""The backend that each operator of the model runs on, and the reason, for the start of a run."""

from __future__ import annotations

import torch

from m1_kernels import choose_backend, choose_elementwise_backend, choose_expert_backend, choose_softmax_backend
from m1_stages.config import ModelConfig


def backend_choices(model_config: ModelConfig, *, precision: str, device: torch.device) -> dict[str, str]:
    """Return "NAME: WHY" of every operator that has more than one backend.

    The answers come from the functions that choose during the forward pass.

    Args:
        model_config: the shape of the model; the kernels depend on ``head_dim``.
        precision: "fp32" or "bf16", as in the configuration.
        device: where the model computes.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    head_sizes = (model_config.head_dim, model_config.head_dim)
    return {
        "lightning attention": str(choose_backend(device, dtype, head_sizes)),
        "softmax attention": str(choose_softmax_backend(device, dtype)),
        "experts": str(choose_expert_backend(device, dtype)),
        "element-wise kernels": str(choose_elementwise_backend(device, dtype)),
    }
