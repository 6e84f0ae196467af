"""Low-rank adapters beside frozen matrices: making them, exchanging them for a checkpoint's, and merging them into the weights.

The adapter matrices of a sharded weight are cut like the weight; ``b`` starts at 0, so a model begins as what it starts from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from m1_stages.config.lora import LORA_TARGETS, LoraConfig
from m1_stages.model.attention import SoftmaxAttention
from m1_stages.model.merged import merged

if TYPE_CHECKING:
    from m1_stages.model.hybrid import HybridModel


class LinearAdapter(nn.Module):
    """``scale * B A x`` beside a linear layer: ``a`` [rank, in] and ``b`` [out, rank] in the dtype of its weight.

    Args:
        weight: of the layer, this rank's part [out, in].
        sharded: axis of ``weight`` that is cut over the tensor-parallel ranks; None when each has all of it.
        tp_group: these ranks, which share the tokens of a layer's input (sequence parallelism).
    """

    def __init__(self, weight: Tensor, lora: LoraConfig, *, sharded: int | None, tp_group: Any) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.scale, self.tp_group, self._sharded = lora.scale, tp_group, sharded
        self.a = nn.Parameter(weight.new_empty(lora.rank, in_features))
        self.b = nn.Parameter(weight.new_zeros(out_features, lora.rank))
        self._axes = {"b": 0} if sharded == 0 else {"a": 1} if sharded == 1 else {}
        for name, param in (("a", self.a), ("b", self.b)):
            if name in self._axes:
                set_tensor_model_parallel_attributes(param, True, self._axes[name], 1)
            else:  # each tensor-parallel rank has the gradient of its own tokens
                param.sequence_parallel = tp_group.size() > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], with the tokens and channels that the layer beside it takes and gives."""
        inner = F.linear(x, self.a)
        if self.tp_group.size() > 1 and self._sharded == 0:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        elif self.tp_group.size() > 1 and self._sharded == 1:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        return F.linear(inner, self.b) * self.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One of the two is cut as the weight is."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, self._axes, sharded_offsets
        )
        return state


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapter belongs: the attribute ``name`` of ``module``, for a parameter ``weight`` of ``owner``."""

    module: Any
    name: str
    owner: Any
    weight: nn.Parameter

    @property
    def adapter(self) -> Any:
        return getattr(self.module, self.name)

    def put(self, adapter: nn.Module | None) -> None:
        setattr(self.module, self.name, adapter)


def freeze_and_attach(chunks: Sequence[HybridModel], lora: LoraConfig) -> None:
    """Freeze all parameters of the model and give it adapters, whose values are not set yet."""
    for chunk in chunks:
        chunk.requires_grad_(False)
    _attach(chunks, lora)


@contextmanager
def adapters_of(chunks: Sequence[HybridModel], lora: LoraConfig | None) -> Iterator[None]:
    """Let the model have adapters like those of a checkpoint (None: none), without values, in place of its own.

    Afterwards it has its own again. What is to stay of the others is merged before that (``merge``).
    """
    own = [(place, place.adapter) for place in _places(chunks)]
    try:
        for place, _ in own:
            place.put(None)
        if lora is not None:
            _attach(chunks, lora)
        yield
    finally:
        for place, adapter in own:
            place.put(adapter)


@torch.no_grad()
def merge(chunks: Sequence[HybridModel]) -> None:
    """Add the adapters that the model has at present to its weights; each rank has what its parts need."""
    for place in _places(chunks):
        if (adapter := place.adapter) is not None:
            place.weight.copy_(merged(place.weight, adapter.a, adapter.b, adapter.scale))


def has_adapters(chunks: Sequence[HybridModel]) -> bool:
    """Whether the model has adapters beside its weights."""
    return any(place.adapter is not None for place in _places(chunks))


def _attach(chunks: Sequence[HybridModel], lora: LoraConfig) -> None:
    for place in _places(chunks, lora):
        sharded = {ColumnParallelLinear: 0, RowParallelLinear: 1}.get(type(place.owner))
        place.put(LinearAdapter(place.weight.data, lora, sharded=sharded, tp_group=place.owner.tp_group))


def _places(chunks: Sequence[HybridModel], lora: LoraConfig | None = None) -> list[_Place]:
    """The places of all adapters that there can be, or of those of ``lora``."""
    lora = lora or LoraConfig(stage="", rank=1, alpha=1.0, targets=tuple(LORA_TARGETS))
    found = []
    for layer in chain.from_iterable(chunk.decoder.layers for chunk in chunks):
        names = lora.in_layer(is_softmax=isinstance(layer.self_attention, SoftmaxAttention))
        for weight_name, adapter_name in names.items():
            owner, parent = weight_name.rpartition(".")[0], adapter_name.rpartition(".")[0]
            weight = layer.get_parameter(weight_name)
            found.append(
                _Place(layer.get_submodule(parent), adapter_name.rpartition(".")[2], layer.get_submodule(owner), weight)
            )
    return found
