"""Counts the parameters of each part of the model, and those that one rank holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.plan.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of parameters of all layers together, without the padding rows of the vocabulary."""

    embedding: int
    lightning: int
    """Parameters of the attention sublayers with decay: q, k, v, gate, norm, output."""
    softmax: int
    experts: int
    routers: int
    norms: int
    """Parameters of the two norms of each layer and of the last norm."""
    head: int
    experts_active: int
    """Parameters of the experts that one token uses."""

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.embedding + self._shared + self.experts + self.head

    @property
    def active(self) -> int:
        """Number of parameters that one token uses, without embedding and head: how the released 45.9B is counted."""
        return self._shared + self.experts_active

    @property
    def _shared(self) -> int:
        return self.lightning + self.softmax + self.routers + self.norms

    def as_dict(self) -> dict[str, int]:
        """Return all parts, ``total`` and ``active``."""
        return {**asdict(self), "total": self.total, "active": self.active}


def lightning_sublayer(m: ModelConfig) -> int:
    """Count the parameters of one lightning attention: q, k, v and gate, output, norm over all heads."""
    width = m.num_heads * m.head_dim
    return m.hidden_size * 4 * width + width * m.hidden_size + width


def softmax_sublayer(m: ModelConfig) -> int:
    """Count the parameters of one grouped-query attention: q, k, v, output."""
    width = m.num_heads * m.head_dim
    return m.hidden_size * (width + 2 * m.num_kv_heads * m.head_dim) + width * m.hidden_size


def expert_parameters(m: ModelConfig) -> int:
    """Count the parameters of one SwiGLU expert."""
    return 3 * m.hidden_size * m.expert_hidden_size


def count_parameters(m: ModelConfig) -> Parameters:
    """Count the parameters of the whole model from its configuration alone."""
    num_softmax = m.num_layers // m.softmax_every
    return Parameters(
        embedding=m.vocab_size * m.hidden_size,
        lightning=(m.num_layers - num_softmax) * lightning_sublayer(m),
        softmax=num_softmax * softmax_sublayer(m),
        experts=m.num_layers * m.num_experts * expert_parameters(m),
        routers=m.num_layers * m.num_experts * m.hidden_size,
        norms=(2 * m.num_layers + 1) * m.hidden_size,
        head=m.vocab_size * m.hidden_size,
        experts_active=m.num_layers * m.experts_per_token * expert_parameters(m),
    )


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters of one rank: ``dense`` ones are replicated over all data- and context-parallel ranks, ``experts`` over fewer."""

    dense: int
    experts: int


def layers_of_pipeline_rank(m: ModelConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """Return the numbers of (lightning, softmax) layers of pipeline rank ``stage``, in all of its chunks."""
    spans = chunk_spans(m.num_layers, layout.pipeline, layout.virtual_pipeline, layout.pipeline_layers, stage)
    layers = sum(end - first for first, end in spans)
    softmax = sum(end // m.softmax_every - first // m.softmax_every for first, end in spans)
    return layers - softmax, softmax


@lru_cache(maxsize=4096)
def chunk_spans(
    num_layers: int, pipeline: int, virtual: int, layers: tuple[int, ...], stage: int
) -> tuple[tuple[int, int], ...]:
    """Return (first layer, one past the last) of each chunk of pipeline rank ``stage``, in model order."""
    counts = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual, pipeline_layers=layers).chunk_layers(
        num_layers
    )
    ends = list(accumulate(counts))
    return tuple((ends[i] - counts[i], ends[i]) for i in range(stage, len(counts), pipeline))


def rank_parameters(m: ModelConfig, layout: Layout, stage: int) -> RankParameters:
    """Count the parameters of pipeline rank ``stage``: matrices are cut, routers and norms of the hidden size are not."""
    lightning, softmax = layers_of_pipeline_rank(m, layout, stage)
    layers = lightning + softmax
    dense = (lightning * lightning_sublayer(m) + softmax * softmax_sublayer(m)) // layout.tensor
    dense += layers * (m.num_experts + 2) * m.hidden_size
    table = m.padded_vocab_size * m.hidden_size // layout.tensor
    if stage == 0:
        dense += table
    if stage == layout.pipeline - 1:
        dense += table + m.hidden_size
    experts = layers * m.num_experts * expert_parameters(m) // (layout.expert * layout.expert_tensor)
    return RankParameters(dense, experts)


def held_parameters(m: ModelConfig, layout: Layout, stage: int, lora: LoraConfig | None) -> RankParameters:
    """Count the parameters of pipeline rank ``stage`` together with its adapters, if there are any."""
    held = rank_parameters(m, layout, stage)
    return held if lora is None else RankParameters(held.dense + _adapters(m, layout, stage, lora), held.experts)


def trained_parameters(m: ModelConfig, layout: Layout, stage: int, lora: LoraConfig | None) -> RankParameters:
    """Count the parameters of pipeline rank ``stage`` that are trained, and so have gradients and optimizer state."""
    if lora is None:
        return rank_parameters(m, layout, stage)
    return RankParameters(_adapters(m, layout, stage, lora), 0)


def _adapters(m: ModelConfig, layout: Layout, stage: int, lora: LoraConfig) -> int:
    """Count the parameters of a rank's adapters: of the two matrices beside a cut weight one is cut, too."""
    lightning, softmax = layers_of_pipeline_rank(m, layout, stage)
    width, hidden = m.num_heads * m.head_dim, m.hidden_size
    out = width // layout.tensor + hidden
    per_layer = {
        "lightning": lightning * (hidden + 4 * width // layout.tensor + out),
        "softmax": softmax * (hidden + (width + 2 * m.num_kv_heads * m.head_dim) // layout.tensor + out),
        "router": (lightning + softmax) * (hidden + m.num_experts),
    }
    return lora.rank * sum(per_layer[target] for target in lora.targets)
