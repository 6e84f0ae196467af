"""Initial weights that do not depend on how the model is spread over ranks."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

from m1_stages.config import ModelConfig

_DRAWN_AT_ONCE = 4 << 30


def initialize(module: Any, model: ModelConfig, *, seed: int, adapters_only: bool = False) -> None:
    """Fill every parameter, or those of adapters, from a generator seeded by its global name; then cut out this rank's slice.

    Matrices are normal(0, init_std), output projections ``(8L)^-0.25`` of that (DeepNorm, arXiv 2203.00555), norms 1. Adapters
    multiply to 0: their ``b`` is 0, their ``a`` normal with the variance 1 / (3 in).
    A generator is one thread's work, so several full tensors are drawn side by side, of ``_DRAWN_AT_ONCE`` bytes together or one.
    """
    state = module.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    tensors = [t for t in nested_values(state) if isinstance(t, ShardedTensor) and t.data is not None]
    if adapters_only:
        tensors = [tensor for tensor in tensors if "adapter." in tensor.key]
    largest = max((4 * math.prod(tensor.global_shape) for tensor in tensors), default=1)
    threads = max(1, min(torch.get_num_threads(), _DRAWN_AT_ONCE // largest))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(partial(_fill, model=model, seed=seed), tensors):
            pass


@torch.no_grad()  # a thread has its own switch
def _fill(tensor: ShardedTensor, *, model: ModelConfig, seed: int) -> None:
    if "norm" in tensor.key:
        tensor.data.fill_(1.0)
        return
    if tensor.key.endswith("adapter.b"):
        tensor.data.zero_()
        return
    digest = hashlib.sha256(f"{seed}:{tensor.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = model.init_std
    if tensor.key.endswith(("linear_out.weight", "experts.w2")):
        std *= (8 * model.num_layers) ** -0.25
    elif tensor.key.endswith("adapter.a"):
        std = (3 * tensor.global_shape[-1]) ** -0.5
    full = torch.empty(tensor.global_shape).normal_(0.0, std, generator=generator)
    tensor.data.copy_(full[tensor.global_slice()].view(tensor.data.shape))
