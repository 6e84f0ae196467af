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
from m1_stages.hf.config_json import DTYPES, released_config, transformers_config
from m1_stages.hf.model_card import CARD, Lineage, loader_notes, model_card
from m1_stages.hf.targets import Target
from m1_stages.hf.tensor_names import decay_buffers, our_shapes, to_exported, to_released
from m1_stages.hf.tokenizer_files import TEMPLATE, TokenizerFiles

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
        target: who reads it. The files of ``gguf`` are those of ``text01``, which llama.cpp's converter reads.
        architecture: the class that ``text01`` names in ``config.json``.
    """

    model: ModelConfig
    slopes: Slopes
    rope_base: float
    max_positions: int
    dtype: str
    lineage: Lineage
    tokenizer: TokenizerFiles
    target: Target = "hf"
    architecture: str = "MiniMaxText01ForCausalLM"

    @property
    def released(self) -> bool:
        """Whether the decay rates are those that every loader computes."""
        return is_released(self.slopes, self.model)

    @property
    def portable(self) -> bool:
        """Whether loaders besides transformers compute the same function."""
        return self.released and (self.target != "hf" or self.model.rotary_dim == self.model.head_dim)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on who can load the export and how."""
        return loader_notes(self.target, self.model, slopes=self.slopes, own_code=self.tokenizer.own_code)

    def tensors(self, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
        """Yield name and values of every stored tensor, in the order of the files; one of our tensors is in memory at a time.

        Raises:
            CheckpointError: a tensor of ``source`` has another shape.
        """
        convert = to_exported if self.target == "hf" else to_released
        for name, shape in our_shapes(self.model).items():
            for exported_name, tensor in convert(name, get_checked(source, name, shape), self.model):
                yield exported_name, tensor.to(DTYPES[self.dtype])
        if self.target == "hf" and not self.released:
            yield from decay_buffers(self.model, self.slopes)

    def planned(self) -> dict[str, Tensor]:
        """Return every stored tensor on the meta device: name, shape and dtype, without memory."""
        shapes = our_shapes(self.model)
        empty = MemorySource({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        return {name: tensor.to("meta") for name, tensor in self.tensors(empty)}

    def config(self) -> dict[str, Any]:
        """Return the values of ``config.json``."""
        values: dict[str, Any] = {
            "rope_base": self.rope_base,
            "max_positions": self.max_positions,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
        }
        if self.target == "hf":
            return transformers_config(self.model, **values)
        return released_config(self.model, **values, architecture=self.architecture)

    def files(self) -> dict[str, bytes]:
        """Return name and bytes of every file but those of the weights."""
        config = self.config()
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # Where there is no file, llama.cpp's converter takes the template of MiniMax-M1.
        template = {TEMPLATE: self.tokenizer.template} if self.target == "gguf" else {}
        return {
            CONFIG: _json(config),
            GENERATION_CONFIG: _json(generation),
            **self.tokenizer.files,
            **template,
            CARD: self.card(),
        }

    def card(self) -> bytes:
        """Return the model card."""
        text = model_card(
            self.target,
            self.model,
            self.lineage,
            self.notes,
            slopes=self.slopes,
            rope_base=self.rope_base,
            dtype=self.dtype,
            max_positions=self.max_positions,
        )
        return text.encode()


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
