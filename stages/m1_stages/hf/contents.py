"""What the files of an export say, before they are written and when they are read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m1_stages.config import ModelConfig
from m1_stages.decay import Slopes, is_released
from m1_stages.hf.checkpoint_tensors import MemorySource, TensorSource, get_checked
from m1_stages.hf.config_json import DTYPES, Lineage, loader_notes, model_card, released_config
from m1_stages.hf.tensor_names import decay_buffers, our_shapes, to_exported
from m1_stages.hf.tokenizer_files import TokenizerFiles

CARD = "README.md"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """Everything in an export.

    Args:
        slopes: decay rates that the weights were last trained with, [num_layers][num_heads], tokens^-1. Released ones are not
            stored, because every loader computes them; others are stored as transformers' buffers.
        max_positions: longest context that was trained, tokens.
        dtype: ``fp32`` or ``bf16`` for the weights; decay buffers are always fp32.
    """

    model: ModelConfig
    slopes: Slopes
    rope_base: float
    max_positions: int
    dtype: str
    lineage: Lineage
    tokenizer: TokenizerFiles

    @property
    def released(self) -> bool:
        """Whether the decay rates are those that every loader computes."""
        return is_released(self.slopes, self.model)

    @property
    def portable(self) -> bool:
        """Whether loaders besides transformers compute the same function."""
        return self.released and self.model.rotary_dim == self.model.head_dim

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on who can load the export and how."""
        return loader_notes(self.model, released=self.released, own_code=self.tokenizer.own_code)

    def tensors(self, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
        """Yield name and values of every stored tensor, in the order of the files; one of our tensors is in memory at a time.

        Raises:
            CheckpointError: a tensor of ``source`` has another shape.
        """
        for name, shape in our_shapes(self.model).items():
            for exported_name, tensor in to_exported(name, get_checked(source, name, shape), self.model):
                yield exported_name, tensor.to(DTYPES[self.dtype])
        if not self.released:
            yield from decay_buffers(self.model, self.slopes)

    def planned(self) -> dict[str, Tensor]:
        """Return every stored tensor on the meta device: name, shape and dtype, without memory."""
        shapes = our_shapes(self.model)
        empty = MemorySource({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        return {name: tensor.to("meta") for name, tensor in self.tensors(empty)}

    def config(self) -> dict[str, Any]:
        """Return the values of ``config.json``."""
        return released_config(
            self.model,
            rope_base=self.rope_base,
            max_positions=self.max_positions,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
        )

    def files(self) -> dict[str, bytes]:
        """Return name and bytes of every file but those of the weights."""
        config = self.config()
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        card = model_card(self.model, self.lineage, self.notes, dtype=self.dtype, max_positions=self.max_positions)
        return {
            CONFIG: _json(config),
            GENERATION_CONFIG: _json(generation),
            **self.tokenizer.files,
            CARD: card.encode(),
        }


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
