"""The part of the model that one rank holds: one chunk, or several in an interleaved pipeline, used as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import nn

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.model.hybrid import HybridModel
from m1_stages.model.init import initialize
from m1_stages.model.lora import freeze_and_attach
from m1_stages.model.routing import RoutingStats, routing_counts
from m1_stages.model.spec import HybridLayer, transformer_config


class ModelChunks(Sequence[HybridModel]):
    """All chunks of this rank, in model order. Each method applies to every chunk."""

    def __init__(self, model: ModelConfig, chunks: Sequence[HybridModel]) -> None:
        self.model_config, self._chunks = model, list(chunks)

    @overload
    def __getitem__(self, index: int) -> HybridModel: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[HybridModel]: ...
    def __getitem__(self, index: int | slice) -> HybridModel | Sequence[HybridModel]:
        return self._chunks[index]

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def layers(self) -> Iterator[HybridLayer]:
        """The decoder layers of this rank; ``layer_number`` counts those of the whole model from 1."""
        return chain.from_iterable(chunk.decoder.layers for chunk in self)

    @property
    def rope_base(self) -> float:
        """The RoPE base of the softmax layers."""
        return self[0].rope_base

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of this rank."""
        return chain.from_iterable(chunk.parameters() for chunk in self)

    def set_slopes(self, slopes: list[list[float]]) -> None:
        """Set the decay rates, [num_layers][num_heads] tokens^-1; rows of softmax layers are ignored."""
        for chunk in self:
            chunk.set_slopes(slopes)

    def set_rope_base(self, base: float) -> None:
        """Set the RoPE base of every softmax layer."""
        for chunk in self:
            chunk.set_rope_base(base)

    def set_recompute(self, recompute: bool, *, offload: bool = False) -> None:
        """Recompute the activations of every layer in the backward pass, or keep them.

        Args:
            offload: with ``recompute``, the layers' inputs are offloaded to host memory.
        """
        for chunk in self:
            chunk.set_recompute(recompute, offload=offload)

    def reset_adapters(self, *, seed: int) -> None:
        """Give the adapters, if there are any, the values that they begin with."""
        for chunk in self:
            initialize(chunk, self.model_config, seed=seed, adapters_only=True)

    def routing_stats(self) -> RoutingStats:
        """Read and reset the routers' counters; one reduction over the pipeline and one copy to the host."""
        return RoutingStats.of(routing_counts(self).tolist())

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the state by chunk. Keys inside the tensors are global, so any layout loads it."""
        return {f"chunk_{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a filled ``sharded_state_dict`` of the same layout."""
        for i, chunk in enumerate(self):
            chunk.load_state_dict(state[f"chunk_{i}"])

    def before_each_forward(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call ``call`` whenever a chunk begins a micro-batch, until the returned function is called."""
        handles = [chunk.register_forward_pre_hook(lambda *_: call()) for chunk in self]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end


def build_model(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: str = "fp32",
    rope_base: float,
    recompute: bool = False,
    device: str = "cpu",
    seed: int = 0,
    lora: LoraConfig | None = None,
) -> ModelChunks:
    """Build this rank's part of the model with initial weights that are the same for every parallel layout.

    Args:
        device: ``cpu``, ``cuda``, or ``meta`` (shapes only, no memory, no initial weights).
        lora: train adapters and nothing else.
    """
    interleaved = parallel.virtual_pipeline > 1
    with torch.device("meta" if device == "meta" else "cpu" if device == "cpu" else torch.device("cuda")):
        config = transformer_config(model, parallel, bf16=precision == "bf16", on_cpu=device != "cuda")
        built = [
            HybridModel(model, config, chunk=chunk if interleaved else None, recompute=recompute)
            for chunk in range(parallel.virtual_pipeline)
        ]
    chunks = ModelChunks(model, built)
    chunks.set_rope_base(rope_base)
    if lora is not None:
        freeze_and_attach(chunks, lora)
    if device != "meta":
        for chunk in chunks:
            initialize(chunk, model, seed=seed)
    return chunks
