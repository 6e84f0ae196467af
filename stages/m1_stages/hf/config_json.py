"""Makes ``config.json`` of an export, in the dialect of transformers or in that of the released code."""

from __future__ import annotations

from typing import Any

import torch

from m1_stages.config import ModelConfig
from m1_stages.hf.targets import ARCHITECTURES
from m1_stages.hf.tensor_names import PREFILL_BLOCK
from m1_stages.hf.tokenizer_files import TokenizerFiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def transformers_config(
    model: ModelConfig, *, rope_base: float, max_positions: int, dtype: str, tokenizer: TokenizerFiles
) -> dict[str, Any]:
    """Return ``config.json`` for transformers' ``MiniMaxForCausalLM``, with the keys that vLLM <= 0.23 reads beside its own.

    Without ``postnorm`` vLLM and the released code compute another residual rule; without ``head_dim`` and
    ``sliding_window`` vLLM does not start. transformers rotates all channels whatever ``rotary_dim`` says, so a partial
    rotation is expressed as its "proportional" type over permuted rows (``tensor_names.proportional_rows``).
    """
    alpha, beta = model.residual_alpha, model.beta
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rope_base}
    if model.rotary_dim != model.head_dim:
        rope = {
            "rope_type": "proportional",
            "rope_theta": rope_base ** (model.head_dim / model.rotary_dim),
            "partial_rotary_factor": model.rotary_dim / model.head_dim,
        }
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "dtype": DTYPE_NAMES[dtype],
        **_shared(model, max_positions, tokenizer),
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rotary_dim": model.rotary_dim,
        "layer_types": ["full_attention" if softmax else "linear_attention" for softmax in _softmax(model)],
        "attn_type_list": _softmax(model),
        "block_size": PREFILL_BLOCK,
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        **{f"{kind}_alpha_factor": alpha for kind in ("full_attn", "linear_attn", "mlp")},
        **{f"{kind}_beta_factor": beta for kind in ("full_attn", "linear_attn", "mlp")},
        **_layernorm_factors(model),
    }


def released_config(
    model: ModelConfig,
    *,
    rope_base: float,
    max_positions: int,
    dtype: str,
    tokenizer: TokenizerFiles,
    architecture: str,
) -> dict[str, Any]:
    """Return ``config.json`` in the released dialect, for the class ``architecture`` of the released code.

    It has no key of transformers' ``MiniMaxConfig`` alone, and another ``model_type``: transformers, which would rotate all
    channels whatever ``rotary_dim`` says, refuses it in place of computing something else.
    """
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "torch_dtype": DTYPE_NAMES[dtype],
        **_shared(model, max_positions, tokenizer),
        "rope_theta": rope_base,
        "rotary_dim": model.rotary_dim,
        "attn_type_list": _softmax(model),
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        **_layernorm_factors(model),
    }


def _shared(model: ModelConfig, max_positions: int, tokenizer: TokenizerFiles) -> dict[str, Any]:
    """The keys that both dialects have."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.expert_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "use_cache": True,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": model.aux_loss_coef,
        "router_jitter_noise": 0.0,
    }


def _softmax(model: ModelConfig) -> list[int]:
    return [int(model.is_softmax(layer)) for layer in range(model.num_layers)]


def _layernorm_factors(model: ModelConfig) -> dict[str, float]:
    kinds = ("full_attention", "linear_attention", "mlp")
    return {
        **{f"layernorm_{kind}_alpha": model.residual_alpha for kind in kinds},
        **{f"layernorm_{kind}_beta": model.beta for kind in kinds},
    }
