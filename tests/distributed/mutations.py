"""The product with one thing wrong: what a parity or isolation test has to notice.

A mutation replaces one function of the product while a job runs, and counts its calls, or spoils an attribute of
parameters, and counts those. Import it after ``device.use``: it imports Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import m1_kernels.lightning.zigzag
import m1_kernels.softmax_attention.attention
from m1_data.sampling.loader import PackedBatch
from m1_kernels.lightning.zigzag import ContextShards
from m1_stages.model import chunks, norms
from m1_stages.model import packed_seq_params as packing
from m1_stages.model.attention import LightningAttention
from m1_stages.model.hybrid import HybridModel
from m1_stages.model.moe import Router
from m1_stages.runtime import ddp
from m1_stages.runtime.optimizer import Optimizer

Function = Callable[..., Any]


def _no_decay(original: Function, local: Tensor, log_decay: Tensor, cuts: Any) -> Tensor:
    return original(local, torch.zeros_like(log_decay), cuts)  # type: ignore[no-any-return]


def _zeros(original: Function, *args: Any) -> Tensor:
    return torch.zeros_like(original(*args))


def _keys_in_rank_order(original: Function, x: Tensor, shards: ContextShards) -> Tensor:
    return shards.by_ranks(original(x, shards))


def _own_key_gradients_only(original: Function, x: Tensor, shards: ContextShards) -> Tensor:
    parts = list(original(x.detach(), shards).chunk(len(shards.cuts)))
    for shard, part in zip(shards.mine, x.chunk(2), strict=True):
        parts[shard] = part
    return torch.cat(parts)


def _contiguous_positions(original: Function, batch: PackedBatch, rank: int, ranks: int) -> PackedBatch:
    cut: PackedBatch = original(batch, rank, ranks)
    cut.position_ids.copy_(batch.position_ids.chunk(ranks, 1)[rank])
    return cut


def _whole_mask(original: Function, batch: PackedBatch, rank: int, ranks: int) -> PackedBatch:
    """The number of trained tokens of the whole sequence on every rank."""
    cut: PackedBatch = original(batch, rank, ranks)
    object.__setattr__(cut, "trained_tokens", batch.trained_tokens)
    return cut


def _one_document(original: Function, doc_lengths: Sequence[int], group: Any) -> ContextShards:
    shards: ContextShards = original((sum(doc_lengths),), group)
    return shards


def _nothing(original: Function, *args: Any) -> None: ...


def _unreduced(original: Function, x: Tensor, group: Any) -> Tensor:
    return x


def _first_heads(original: Function, layer: LightningAttention, slopes: list[float], device: torch.device) -> None:
    original(layer, slopes[: layer.num_heads] * layer.tp_group.size(), device)


def _first_layers(original: Function, model: HybridModel, slopes: list[list[float]]) -> None:
    first = model.decoder.layers[0].layer_number - 1
    original(model, slopes[-first:] + slopes[:-first] if first else slopes)


def _batched_messages(original: Function, *args: Any, **kwargs: Any) -> Any:
    config = original(*args, **kwargs)
    config.batch_p2p_comm, config.overlap_p2p_comm = True, False
    return config


def _balance_over_ranks(original: Function, router: Router, *args: Tensor) -> Tensor:
    return original(router, *args) / (router.tp_group.size() * router.cp_group.size())  # type: ignore[no-any-return]


@torch.no_grad()
def _weights_in_module_order(original: Function, module: nn.Module, model: Any, *, seed: int) -> None:
    """What Megatron's ``use_cpu_initialization`` gives: every rank draws the weights it has, in order."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in module.named_parameters():
        param.fill_(1.0) if "norm" in name else param.normal_(0.0, model.init_std, generator=generator)


PATCHES: dict[str, tuple[Any, str, Function]] = {
    "no state from earlier shards": (ContextShards, "entering", _zeros),
    "no decay on the state from earlier shards": (m1_kernels.lightning.zigzag, "entering_states", _no_decay),
    "no gradient to earlier shards": (ContextShards, "leaving", _zeros),
    "keys in rank order": (m1_kernels.softmax_attention.attention, "gather_sequence", _keys_in_rank_order),
    "positions of contiguous shards": (PackedBatch, "zigzag", _contiguous_positions),
    "key gradients not summed": (m1_kernels.softmax_attention.attention, "gather_sequence", _own_key_gradients_only),
    "trained tokens of the whole sequence on every rank": (PackedBatch, "zigzag", _whole_mask),
    "documents not told apart": (packing, "zigzag_shards", _one_document),
    "no reduction in the sharded norm, forward": (norms, "reduce_from_tensor_model_parallel_region", _unreduced),
    "no reduction in the sharded norm, backward": (norms, "copy_to_tensor_model_parallel_region", _unreduced),
    "every rank takes the first heads' slopes": (LightningAttention, "set_slopes", _first_heads),
    "every stage takes the first layers' slopes": (HybridModel, "set_slopes", _first_layers),
    "batched messages": (chunks, "transformer_config", _batched_messages),
    "balance loss over TP x CP": (Router, "_balance_loss", _balance_over_ranks),
    "parameters used before they are gathered": (ddp, "_wait_before_use", _nothing),
    "parameters not gathered after the last update": (ddp.TrainableModel, "gather_parameters", _nothing),
    "one step counter for all parameters": (Optimizer, "separate_step_counters", _nothing),
    "weights drawn in module order": (chunks, "initialize", _weights_in_module_order),
}
SPOILED: dict[str, tuple[Callable[[str, nn.Parameter], bool], str, bool]] = {
    "norm weight not sequence parallel": (lambda name, _: "attn_norm" in name, "sequence_parallel", False),
    "router weight not sequence parallel": (lambda name, _: "router" in name, "sequence_parallel", False),
    "expert gradients in the dense groups": (lambda name, _: ".experts." in name, "allreduce", True),
    "experts missing from the gradient norm": (lambda name, _: ".experts." in name, "tensor_model_parallel", False),
    "sharded weights not marked": (
        lambda _, param: getattr(param, "partition_dim", -1) >= 0,
        "tensor_model_parallel",
        False,
    ),
}


class Mutation:
    """``calls``: of the replaced function, or parameters spoiled, on this rank."""

    def __init__(self, name: str) -> None:
        if name and name not in PATCHES and name not in SPOILED:
            raise ValueError(f"no mutation {name!r}")
        self.name, self.calls = name, 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the function, if it is one that is replaced."""
        if self.name not in PATCHES:
            yield
            return
        owner, attribute, wrong = PATCHES[self.name]
        original = getattr(owner, attribute)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return wrong(original, *args, **kwargs)

        with mock.patch.object(owner, attribute, counted):
            yield

    def spoil(self, chunks: Iterable[nn.Module]) -> None:
        """Change the attribute of the parameters, if it is one that is changed; before DDP looks at them."""
        if self.name in SPOILED:
            concerned, attribute, value = SPOILED[self.name]
            for name, param in chain.from_iterable(chunk.named_parameters() for chunk in chunks):
                if concerned(name, param):
                    assert getattr(param, attribute, True) is not value, f"{name}: nothing is spoiled"
                    setattr(param, attribute, value)
                    self.calls += 1
