"""Makes ``config.json`` and the model card of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from m1_stages.config import ModelConfig
from m1_stages.hf.tensor_names import PREFILL_BLOCK
from m1_stages.hf.tokenizer_files import TokenizerFiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """The origin of exported weights, for the model card."""

    checkpoint: str
    checkpoint_sha256: str
    stages: tuple[str, ...]
    tokens_seen: int
    global_step: int
    decay_policy: str
    config_sha256: str = ""
    data_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def released_config(
    model: ModelConfig, *, rope_base: float, max_positions: int, dtype: str, tokenizer: TokenizerFiles
) -> dict[str, Any]:
    """Return ``config.json``: transformers' keys, and those that the released code and vLLM read under other names.

    Without ``postnorm`` vLLM and the released code compute another residual rule; without ``head_dim`` and
    ``sliding_window`` vLLM does not start. transformers rotates all channels whatever ``rotary_dim`` says, so a partial
    rotation is expressed as its "proportional" type over permuted rows (``tensor_names.proportional_rows``).
    """
    alpha, beta = model.residual_alpha, model.beta
    softmax = [model.is_softmax(layer) for layer in range(model.num_layers)]
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
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rotary_dim": model.rotary_dim,
        "layer_types": ["full_attention" if s else "linear_attention" for s in softmax],
        "attn_type_list": [int(s) for s in softmax],
        "block_size": PREFILL_BLOCK,
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        **{f"{kind}_alpha_factor": alpha for kind in ("full_attn", "linear_attn", "mlp")},
        **{f"{kind}_beta_factor": beta for kind in ("full_attn", "linear_attn", "mlp")},
        **{f"layernorm_{kind}_alpha": alpha for kind in ("full_attention", "linear_attention", "mlp")},
        **{f"layernorm_{kind}_beta": beta for kind in ("full_attention", "linear_attention", "mlp")},
    }


def loader_notes(model: ModelConfig, *, released: bool, own_code: str = "") -> tuple[str, ...]:
    """Say in sentences who can load the export and how.

    Args:
        released: whether the decay rates are the released ones, which every loader computes.
        own_code: the tokenizer's own code, which is left out.
    """
    notes = ["transformers >= 5.20 loads it. Use fp32: its bf16 decoding rounds decay rates and state to bf16."]
    if not released:
        notes.append(
            "transformers only: the decay rates are not the released ones. They are stored as buffers, which vLLM, "
            "SGLang and the released code neither read nor accept."
        )
    if model.rotary_dim != model.head_dim:
        notes.append(
            f"transformers only: {model.rotary_dim} of {model.head_dim} channels are rotated. transformers ignores "
            "rotary_dim, so query and key rows are permuted for its 'proportional' RoPE type; other loaders would "
            "rotate the wrong channels."
        )
    if len(notes) == 1:
        notes.append(
            "Tensor names and configuration are also those vLLM <= 0.23 reads (later versions dropped the model); "
            "start it with --mamba-cache-dtype float32. Its lightning norm uses epsilon 1e-5, this model 1e-6. "
            "Known from its source, not run."
        )
    if own_code:
        notes.append(
            f"The tokenizer named code of its own (auto_map: {own_code}), which is not part of the export: tokenizer.json "
            "is loaded as PreTrainedTokenizerFast, without trust_remote_code."
        )
    return tuple(notes)


CARD_MARK = "Checkpoint SHA-256"
"""A row of every model card; an export and its checkpoint are recognised by it."""


def checkpoint_of_card(folder: Path) -> str | None:
    """Return the SHA-256 of the checkpoint that the model card in ``folder`` names; None when there is none."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    found = re.search(rf"^\| {CARD_MARK} \| ([0-9a-f]+) \|$", card, re.MULTILINE)
    return found[1] if found else None


def model_card(model: ModelConfig, lineage: Lineage, notes: tuple[str, ...], *, dtype: str, max_positions: int) -> str:
    """Return the text of the export's ``README.md``."""
    versions = ", ".join(f"{name} {number}" for name, number in lineage.versions.items()) or "not recorded"
    softmax = sum(model.is_softmax(layer) for layer in range(model.num_layers))
    rows = {
        "Layers": f"{model.num_layers - softmax} lightning attention, {softmax} softmax attention",
        "Width, heads": f"{model.hidden_size}, {model.num_heads} x {model.head_dim}",
        "Experts": f"{model.num_experts} per layer, {model.experts_per_token} per token",
        "Longest training context": f"{max_positions:,} tokens",
        "Stored weights": dtype,
        "Stages": " -> ".join(lineage.stages),
        "Tokens trained": f"{lineage.tokens_seen:,}",
        "Optimizer steps": f"{lineage.global_step:,}",
        "Decay policy": lineage.decay_policy,
        "Checkpoint": lineage.checkpoint,
        CARD_MARK: lineage.checkpoint_sha256,
        "Configuration SHA-256": lineage.config_sha256 or "not recorded",
        "Data fingerprint": lineage.data_fingerprint or "not recorded",
        "Written with": versions,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    loaders = "\n".join(f"- {note}" for note in notes)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# Lightning-attention hybrid\n\n| | |\n|---|---|\n{table}\n\n## Who can load it\n\n{loaders}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="float32")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )
