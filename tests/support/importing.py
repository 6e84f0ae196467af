"""Sources for ``m1 import``: folders as the Hub stores the released models, and runs that take them over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.exporting import make_tokenizer, weights
from torch import Tensor

from m1_stages.config import ModelConfig, Resolved
from m1_stages.config.load import load_config
from m1_stages.hf.tensor_names import to_released
from m1cli.commands.import_model import model_lines

RELEASED = ModelConfig(
    hidden_size=48, num_layers=8, num_heads=4, head_dim=16, num_kv_heads=2, rotary_dim=8, num_experts=4,
    expert_hidden_size=40, vocab_size=300,
)  # fmt: skip
"""The released model, shrunken: seven lightning layers and a softmax layer, and half of the channels rotated."""


def released_config(model: ModelConfig, **changes: Any) -> dict[str, Any]:
    """The keys of the released ``config.json`` (MiniMax-M1); those that are None in ``changes`` are left out."""
    alpha = model.residual_alpha
    values = {
        "architectures": ["MiniMaxM1ForCausalLM"],
        "attention_dropout": 0.0,
        "attn_type_list": [int(model.is_softmax(n)) for n in range(model.num_layers)],
        "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.expert_hidden_size,
        **{f"layernorm_{kind}_alpha": alpha for kind in ("full_attention", "linear_attention", "mlp")},
        **{f"layernorm_{kind}_beta": model.beta for kind in ("full_attention", "linear_attention", "mlp")},
        "max_position_embeddings": 10240000,
        "model_type": "minimax_m1",
        "num_attention_heads": model.num_heads,
        "num_experts_per_tok": model.experts_per_token,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "num_local_experts": model.num_experts,
        "output_router_logits": False,
        "postnorm": True,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": 10000000,
        "rotary_dim": model.rotary_dim,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.45.2",
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    return {key: value for key, value in (values | changes).items() if key not in changes or changes[key] is not None}


def released_tensors(model: ModelConfig, *, seed: int = 3, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights of a trained model's scale under the released names: in ``dtype``, routers in fp32."""
    return {
        name: part.to(torch.float32 if name.endswith("block_sparse_moe.gate.weight") else dtype).contiguous()
        for ours, tensor in weights(model, seed).items()
        for name, part in to_released(ours, tensor, model)
    }


def write_source(
    folder: Path,
    model: ModelConfig = RELEASED,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    shards: int = 3,
    with_tokenizer: bool = True,
) -> Path:
    """Write a folder as the Hub stores it; with one shard there is no index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released_config(model) if config is None else config, indent=2))
    tensors = released_tensors(model) if tensors is None else tensors
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
    else:
        names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        place = {key: names[n * shards // len(tensors)] for n, key in enumerate(tensors)}
        for name in names:
            save_file({key: tensors[key] for key in tensors if place[key] == name}, folder / name)
        size = sum(t.nbytes for t in tensors.values())
        index = {"weight_map": place, "metadata": {"total_size": size}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if with_tokenizer:
        make_tokenizer(folder)
        (folder / "generation_config.json").write_text('{"temperature": 1.0, "top_p": 0.95}')
    return folder


def configure(folder: Path, model: ModelConfig = RELEASED, *overrides: str) -> Resolved:
    """A run in ``folder`` whose configuration is that of ``model``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "m1.toml"
    path.write_text("\n".join(['preset = "tiny"', "[model]", *model_lines(model)]))
    return load_config(path, ['run.device="cpu"', *overrides])


def shrunken(preset: str, folder: Path) -> ModelConfig:
    """The shape of a preset with everything that may be smaller made small."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m1.toml").write_text(f'preset = "{preset}"')
    model = load_config(folder / "m1.toml").config.model
    heads = min(model.num_heads, 4)
    return dataclasses.replace(
        model,
        hidden_size=32,
        num_layers=model.softmax_every * (2 if preset == "7b-a1b" else 1),
        num_heads=heads,
        num_kv_heads=max(1, heads * model.num_kv_heads // model.num_heads),
        head_dim=16,
        rotary_dim=16 * model.rotary_dim // model.head_dim,
        num_experts=4,
        expert_hidden_size=24,
        vocab_size=300,
    )
