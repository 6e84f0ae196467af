"""Reads the ``config.json`` of a checkpoint of this family, in both of its dialects, into our model section.

The released configurations (``minimax_text_01``, ``minimax_m1``) and transformers' (``minimax``) name the same things
differently. transformers' ``MiniMaxConfig`` drops the released names without a word, so it is not used. Every key is used,
checked, known not to matter, or named in a note.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from m1_stages.config import ModelConfig
from m1_stages.errors import ConfigError

CONFIG = "config.json"
MODEL_TYPES = ("minimax", "minimax_text_01", "minimax_m1")
RESIDUALS = {
    "full_attention": ("full_attn_{}_factor", "layernorm_full_attention_{}"),
    "linear_attention": ("linear_attn_{}_factor", "layernorm_linear_attention_{}"),
    "mlp": ("mlp_{}_factor", "layernorm_mlp_{}"),
}
"""The names of alpha and beta of each sublayer: transformers' and the released one."""
LIGHTNING, SOFTMAX = "linear_attention", "full_attention"

_WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
          "num_local_experts", "num_experts_per_tok", "vocab_size")  # fmt: skip
_LAYERS = ("attn_type_list", "decoder_attention_types", "layer_types")
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "partial_rotary_factor")
_USED = {"model_type", "head_dim", "rms_norm_eps", "max_position_embeddings", *_WHOLE, *_LAYERS, *_ROPE} | {
    name.format(letter) for names in RESIDUALS.values() for name in names for letter in ("alpha", "beta")
}
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the experts here are SwiGLU"),
    "postnorm": ((True,), "the residual is taken after the norm here"),
    "tie_word_embeddings": ((False,), "embedding and head are two tensors here"),
    "sliding_window": ((None,), "softmax layers see the whole text here"),
    "shared_intermediate_size": ((0, None, [0]), "there are no shared experts here"),
    "attention_bias": ((False, None), "the projections have no bias here"),
    "mlp_bias": ((False, None), "the projections have no bias here"),
    "use_qk_norm": ((False, None), "queries and keys have no norm here"),
    "quantization_config": ((None,), "the weights must be bf16, fp16 or fp32"),
}
"""Keys that may only say what this model does, and the reason."""
_TRAINING_ONLY = {"attention_dropout": 0.0, "router_jitter_noise": 0.0, "attn_dropout": 0.0, "hidden_dropout": 0.0}
"""Keys that change nothing but a training run; noted when they are not what we do."""
_NO_MATTER = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "output_router_logits",
    "router_aux_loss_coef", "shared_moe_mode", "block_size", "block", "_name_or_path", "name_or_path", "return_dict",
    "output_attentions", "output_hidden_states", "id2label", "label2id", "is_encoder_decoder", "problem_type",
    "chunk_size_feed_forward", "mamba_cache_dtype",
}  # fmt: skip
"""Keys that do not touch the function: ids, dtypes of the files, how a loader computes, settings of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """What a ``config.json`` says."""

    model: ModelConfig
    rope_base: float
    max_positions: int
    """Longest context that it names, tokens."""
    proportional: bool
    """Query and key rows are in the order of transformers' "proportional" RoPE type."""
    model_type: str
    architectures: tuple[str, ...]
    notes: tuple[str, ...]
    """What a person should know: keys that nobody knows, and those that say something of training only."""


def read_source_config(folder: Path) -> SourceConfig:
    """Read ``config.json`` in ``folder``.

    Raises:
        ConfigError: missing, damaged, or of another model; the message names key, value and reason.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the source's configuration: {error}",
            where=str(path),
            fix="name a folder with config.json and safetensors files",
        ) from error
    return parse_source_config(values, str(path))


def parse_source_config(values: Mapping[str, Any], where: str) -> SourceConfig:
    """Read the values of a ``config.json``.

    Args:
        where: names the file in messages.

    Raises:
        ConfigError: a model that this one is not; the message names key, value and reason.
    """
    return _Reader(values, where).read()


class _Reader:
    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def refuse(self, key: str, reason: str) -> NoReturn:
        value = json.dumps(self.values[key]) if key in self.values else "missing"
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        raise ConfigError(
            f"{key} is {shown}: {reason}",
            where=f"{self.where}, key {key}",
            fix="m1 reads MiniMax-Text-01, MiniMax-M1 and exports of m1; this source cannot be imported",
        )

    def read(self) -> SourceConfig:
        v = self.values
        if v.get("model_type") not in MODEL_TYPES:
            self.refuse("model_type", f"it must be one of {', '.join(MODEL_TYPES)}")
        for key, (allowed, reason) in _MUST_BE.items():
            if key in v and not any(v[key] == a and type(v[key]) is type(a) for a in allowed):
                self.refuse(key, reason)
        if "postnorm" not in v and v["model_type"] != "minimax":
            self.refuse("postnorm", "the released code then takes the residual before the norm, and here it is after")
        for key in _WHOLE:
            self.whole(key)
        layers, heads = v["num_hidden_layers"], v["num_attention_heads"]
        if heads & (heads - 1):
            self.refuse("num_attention_heads", "not a power of two: loaders compute different decay rates then")
        if heads % v["num_key_value_heads"]:
            self.refuse("num_key_value_heads", f"it does not divide num_attention_heads = {heads}")
        if v["num_experts_per_tok"] > v["num_local_experts"]:
            self.refuse("num_experts_per_tok", f"there are {v['num_local_experts']} experts")
        head_dim = self.whole("head_dim") if v.get("head_dim") is not None else v["hidden_size"] // heads
        alpha, beta = self.residual("alpha"), self.residual("beta")
        rotary_dim, rope_base, proportional = self.rope(head_dim)
        of_deepnorm = math.isclose(alpha, (2 * layers) ** 0.25, rel_tol=1e-12)
        model = ModelConfig(
            hidden_size=v["hidden_size"],
            num_layers=layers,
            num_heads=heads,
            head_dim=head_dim,
            num_kv_heads=v["num_key_value_heads"],
            rotary_dim=rotary_dim,
            num_experts=v["num_local_experts"],
            expert_hidden_size=v["intermediate_size"],
            vocab_size=v["vocab_size"],
            experts_per_token=v["num_experts_per_tok"],
            softmax_every=self.softmax_every(layers),
            norm_eps=self.number("rms_norm_eps"),
            alpha=0.0 if of_deepnorm else alpha,
            beta=beta,
        )
        return SourceConfig(
            model=model,
            rope_base=rope_base,
            max_positions=self.whole("max_position_embeddings"),
            proportional=proportional,
            model_type=v["model_type"],
            architectures=tuple(map(str, v.get("architectures") or ())),
            notes=tuple(self.notes(rotary_dim, head_dim, proportional)),
        )

    def whole(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 < value < 2**40:
            self.refuse(key, "it must be a whole number above 0")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self.refuse(key, "it must be a number above 0")
        return float(value)

    def residual(self, letter: str) -> float:
        """Alpha or beta, which the model has one of; a key that is missing means 1 in every loader."""
        found: dict[str, float] = {}
        for names in RESIDUALS.values():
            present = [name.format(letter) for name in names if name.format(letter) in self.values]
            found |= {key: self.number(key) for key in present} or {names[0].format(letter): 1.0}
        first, *others = found
        for key in others:
            if found[key] != found[first]:
                self.refuse(key, f"{first} is {found[first]!r}, and the model here has one {letter} for all sublayers")
        return found[first]

    def softmax_every(self, layers: int) -> int:
        kinds: dict[str, list[bool]] = {}
        for key in _LAYERS:
            if self.values.get(key) is None:
                continue
            names: Any = [LIGHTNING, SOFTMAX] if key == "layer_types" else [0, 1]
            listed = self.values[key]
            if not isinstance(listed, list) or len(listed) != layers:
                self.refuse(key, f"it must be a list of {layers}, one entry per layer")
            if wrong := [n for n, kind in enumerate(listed) if kind not in names or isinstance(kind, bool)]:
                self.refuse(key, f"entry {wrong[0]} is {listed[wrong[0]]!r}; it must be {names[0]!r} or {names[1]!r}")
            kinds[key] = [kind == names[1] for kind in listed]
        if not kinds:
            self.refuse(_LAYERS[0], "neither it nor layer_types says which layers are softmax attention")
        key, *others = kinds
        for other in others:
            if kinds[other] != kinds[key]:
                self.refuse(other, f"it contradicts {key}")
        every = kinds[key].index(True) + 1 if True in kinds[key] else 0
        if not every or layers % every or kinds[key] != [(n + 1) % every == 0 for n in range(layers)]:
            self.refuse(key, "softmax layers must come at equal distances, the last layer of each block, as in 7:1")
        return every

    def rope(self, head_dim: int) -> tuple[int, float, bool]:
        """Return rotated channels, base, and whether rows are in the "proportional" order."""
        v = self.values
        parameters = v.get("rope_parameters") or {}
        if not isinstance(parameters, dict) or (unknown := parameters.keys() - {"type", "rope_type", "rope_theta",
                                                                                "partial_rotary_factor"}):  # fmt: skip
            self.refuse("rope_parameters", f"unknown: {', '.join(sorted(unknown)) if parameters else 'it is no table'}")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "proportional"):
            self.refuse("rope_parameters", f"positions are not scaled here, and rope_type is {kind!r}")
        scaling = v.get("rope_scaling")
        if scaling is not None and scaling != parameters:
            self.refuse("rope_scaling", "positions are not scaled here")
        thetas = {
            name: table["rope_theta"]
            for name, table in (("rope_parameters", parameters), ("rope_theta", v))
            if table.get("rope_theta") is not None
        }
        if not thetas:
            self.refuse("rope_theta", "the RoPE base is not known")
        if len(set(thetas.values())) > 1:
            self.refuse("rope_theta", f"rope_parameters says {thetas['rope_parameters']!r}")
        theta = next(iter(thetas.values()))
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 < theta < math.inf:
            self.refuse(next(iter(thetas)), "the RoPE base must be a number above 1")
        rotary_dim = self.rotary_dim(head_dim, parameters)
        if kind == "default":
            return rotary_dim, float(theta), False
        if rotary_dim == head_dim:
            return rotary_dim, float(theta), False
        return rotary_dim, _base_of_proportional(float(theta), head_dim / rotary_dim), True

    def rotary_dim(self, head_dim: int, parameters: Mapping[str, Any]) -> int:
        said: dict[str, float] = {}
        for key, table in (("rotary_dim", self.values), ("partial_rotary_factor", self.values),
                           ("partial_rotary_factor", parameters)):  # fmt: skip
            if (value := table.get(key)) is None:
                continue
            where = key if table is self.values else "rope_parameters"
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self.refuse(where, "it must be a number")
            said[where] = value if key == "rotary_dim" else value * head_dim
        channels = next(iter(said.values()), head_dim)
        for key, value in said.items():
            if value != channels:
                self.refuse(
                    key, f"it means {value:g} rotated channels of {head_dim}, and {next(iter(said))} {channels:g}"
                )
            if not 0 < value <= head_dim or value % 2:
                self.refuse(key, f"rotated channels must be even and at most head_dim = {head_dim}")
        return int(channels)

    def notes(self, rotary_dim: int, head_dim: int, proportional: bool) -> list[str]:
        v, notes = self.values, []
        if unknown := sorted(v.keys() - _USED - _MUST_BE.keys() - _TRAINING_ONLY.keys() - _NO_MATTER):
            shown = ", ".join(f"{key} = {json.dumps(v[key])[:40]}" for key in unknown[:8])
            notes.append(f"m1 does not know {shown}{' and more' if len(unknown) > 8 else ''}, and left it out")
        for key, usual in _TRAINING_ONLY.items():
            if v.get(key, usual) not in (usual, None):
                notes.append(f"{key} is {v[key]!r} in the source: training here has none")
        if v["model_type"] == "minimax" and rotary_dim != head_dim and not proportional:
            notes.append(
                f"rotary_dim is {rotary_dim} of {head_dim}: m1 follows it, as the released code does; transformers rotates "
                "all channels of this model whatever it says"
            )
        return notes


def _base_of_proportional(theta: float, power: float) -> float:
    """The base whose ``power`` is ``theta``; a round number where it gives ``theta`` exactly."""
    base = theta ** (1.0 / power)
    return next((b for b in (float(f"{base:.{n}g}") for n in range(1, 17)) if b**power == theta), base)
