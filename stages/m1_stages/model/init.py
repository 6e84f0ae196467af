"""Initial weights that do not depend on how the model is spread over ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

from m1_stages.config import ModelConfig


@torch.no_grad()
def initialize(module: Any, model: ModelConfig, *, seed: int) -> None:
    """Fill every parameter from a generator seeded by its global name, then cut out this rank's slice.

    Matrices are normal(0, init_std), output projections ``(8L)^-0.25`` of that (DeepNorm, arXiv 2203.00555), norms 1.
    One full tensor exists at a time.
    """
    for tensor in nested_values(module.sharded_state_dict(metadata={"non_homogeneous_layers": True})):
        if not isinstance(tensor, ShardedTensor) or tensor.data is None:
            continue
        if "norm" in tensor.key:
            tensor.data.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}:{tensor.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = model.init_std
        if tensor.key.endswith(("linear_out.weight", "experts.w2")):
            std *= (8 * model.num_layers) ** -0.25
        full = torch.empty(tensor.global_shape).normal_(0.0, std, generator=generator)
        tensor.data.copy_(full[tensor.global_slice()].view(tensor.data.shape))
