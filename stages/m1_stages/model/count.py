"""Parameter counts from the configuration alone; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from m1_stages.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Numbers of parameters, padding rows of the vocabulary not counted."""

    total: int
    active: int
    """Used by one token, embedding and head left out (how the released 45.9B is counted)."""
    lightning_layer: int
    """One lightning attention sublayer."""
    softmax_layer: int
    """One softmax attention sublayer."""
    experts_layer: int
    """All experts of one layer."""
    embedding_and_head: int


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of the hybrid model."""
    h, width = model.hidden_size, model.num_heads * model.head_dim
    lightning = h * 4 * width + width + width * h
    softmax = h * (width + 2 * model.num_kv_heads * model.head_dim) + width * h
    expert = 3 * h * model.expert_hidden_size
    num_softmax = model.num_layers // model.softmax_every
    shared = (
        (model.num_layers - num_softmax) * lightning
        + num_softmax * softmax
        + model.num_layers * (2 * h + model.num_experts * h)
        + h
    )
    return ParameterCount(
        total=shared + model.num_layers * model.num_experts * expert + 2 * model.vocab_size * h,
        active=shared + model.num_layers * model.experts_per_token * expert,
        lightning_layer=lightning,
        softmax_layer=softmax,
        experts_layer=model.num_experts * expert,
        embedding_and_head=2 * model.vocab_size * h,
    )
