"""Makes the model card of an export: the origin of the weights as the checkpoint records it, and who can load them how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from m1_stages.config import ModelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.decay import Slopes, half_life_tokens, is_released
from m1_stages.hf.targets import LLAMA_CPP_SOFTMAX_EVERY, RELEASED_NORM_EPS, Target, gguf_name

VLLM_NORM_EPS = 1e-5
"""Epsilon of the lightning output norm in vLLM <= 0.23."""
EARLY_LLAMA_CPP_VOCABULARY = 200_032
"""The first llama.cpp versions with this model never sample a token from this id on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """One stage on the way to the weights; None and an empty text are what the checkpoint does not record."""

    name: str
    row_tokens: int
    rope_base: float | None = None
    tokens: int | None = None
    mix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """The origin of exported weights, for the model card."""

    checkpoint: str
    checkpoint_sha256: str
    stages: tuple[StageFacts, ...]
    tokens_seen: int
    global_step: int
    decay_policy: str
    config_sha256: str = ""
    data_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    evaluation: tuple[tuple[str, str], ...] = ()
    """Name and value of every result that the run holds for this checkpoint."""
    license: str = ""
    """Identifier of the licence; empty when nobody named one."""


def loader_notes(target: Target, model: ModelConfig, *, slopes: Slopes, own_code: str = "") -> tuple[str, ...]:
    """Say in sentences who can load the export and how, and what each loader is known to do wrong.

    Args:
        own_code: the tokenizer's own code, which is left out.
    """
    notes = {"hf": _transformers_notes, "text01": _released_notes, "gguf": _llama_cpp_notes}[target](model, slopes)
    if own_code:
        notes.append(
            f"The tokenizer named code of its own (auto_map: {own_code}), which is not part of the export: tokenizer.json "
            "is loaded as PreTrainedTokenizerFast, without trust_remote_code."
        )
    return tuple(notes)


def _transformers_notes(model: ModelConfig, slopes: Slopes) -> list[str]:
    notes = [
        "transformers >= 5.17 loads it. Use fp32: its bf16 decoding rounds decay rates and state to bf16.",
        "transformers' generate() is right for one prompt, or prompts of one length. It is wrong for left-padded batches, and "
        "where a cache is continued by several tokens at once (chunked prefill, assisted decoding) or without position_ids: "
        "the first layer is a lightning layer, whose cache reports a length of 0.",
    ]
    limits = []
    if not is_released(slopes, model):
        limits.append(
            "transformers only: the decay rates are not the released ones. They are stored as buffers, which vLLM, "
            "SGLang and the released code neither read nor accept."
        )
    if model.rotary_dim != model.head_dim:
        limits.append(
            f"transformers only: {model.rotary_dim} of {model.head_dim} channels are rotated. transformers ignores "
            "rotary_dim, so query and key rows are permuted for its 'proportional' RoPE type; other loaders would "
            "rotate the wrong channels. They read the targets text01 and gguf."
        )
    if not limits:
        limits = [f"Tensor names and configuration are also those vLLM <= 0.23 reads. {_vllm()}"]
    return [*notes, *limits]


def _released_notes(model: ModelConfig, slopes: Slopes) -> list[str]:
    notes = [
        "Tensor names, index file and configuration are those of the released MiniMax-Text-01 and MiniMax-M1: for their own "
        "modeling code (not part of this folder; it needs transformers 4), vLLM <= 0.23 and llama.cpp's converter. "
        "transformers itself does not load it: m1 export --target hf writes what it loads.",
        _vllm(),
    ]
    if model.softmax_every != LLAMA_CPP_SOFTMAX_EVERY:
        notes.append(
            f"Not for llama.cpp: every {model.softmax_every}th layer is a softmax layer, and llama.cpp takes every "
            f"{LLAMA_CPP_SOFTMAX_EVERY}th for one, without an error."
        )
    return notes


def _llama_cpp_notes(model: ModelConfig, slopes: Slopes) -> list[str]:
    notes = [
        "llama.cpp loads it from build b10437 on. With f32 key-value caches (-ctk f32 -ctv f32) it computes in fp32."
    ]
    if model.lightning_norm_eps != model.norm_eps:
        notes.append(
            f"llama.cpp computes the lightning output norm with epsilon {model.norm_eps:g}, this model was trained with "
            f"{model.lightning_norm_eps:g}: logits differ by more than rounding; m1 export --verify says how much."
        )
    if model.vocab_size > EARLY_LLAMA_CPP_VOCABULARY:
        notes.append(
            f"Early llama.cpp versions never sample a token id of {EARLY_LLAMA_CPP_VOCABULARY:,} or above; this model has "
            f"{model.vocab_size:,}."
        )
    return notes


def _vllm() -> str:
    return (
        "vLLM dropped the model after 0.23; start it with --mamba-cache-dtype float32. Its lightning norm uses epsilon "
        f"{VLLM_NORM_EPS:g}, this model {RELEASED_NORM_EPS:g}. Known from its source, not run."
    )


CARD = "README.md"
CARD_MARK = "Checkpoint SHA-256"
"""A row of every model card; an export and its checkpoint are recognised by it."""


def checkpoint_of_card(folder: Path) -> str | None:
    """Return the SHA-256 of the checkpoint that the model card in ``folder`` names; None when there is none."""
    try:
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    found = re.search(rf"^\| {CARD_MARK} \| ([0-9a-f]+) \|$", card, re.MULTILINE)
    return found[1] if found else None


def model_card(
    target: Target,
    model: ModelConfig,
    lineage: Lineage,
    notes: tuple[str, ...],
    *,
    slopes: Slopes,
    rope_base: float,
    dtype: str,
    max_positions: int,
) -> str:
    """Return the text of the export's ``README.md``."""
    versions = ", ".join(f"{name} {number}" for name, number in lineage.versions.items()) or "not recorded"
    softmax = sum(model.is_softmax(layer) for layer in range(model.num_layers))
    rows = {
        "Layers": f"{model.num_layers - softmax} lightning attention, {softmax} softmax attention",
        "Width, heads": f"{model.hidden_size}, {model.num_heads} x {model.head_dim} ({model.num_kv_heads} key-value)",
        "Experts": f"{model.num_experts} per layer, {model.experts_per_token} per token",
        "Rotary embedding": f"{model.rotary_dim} of {model.head_dim} channels, base {rope_base:g}",
        "Longest training context": f"{max_positions:,} tokens",
        "Stored weights": dtype,
        "Stages": " -> ".join(stage.name for stage in lineage.stages),
        "Tokens trained": f"{lineage.tokens_seen:,}",
        "Optimizer steps": f"{lineage.global_step:,}",
        "Decay policy": f"{lineage.decay_policy}; {_half_lives(model, slopes)}",
        "Epsilon": f"{model.norm_eps:g}; lightning output norm {model.lightning_norm_eps:g}",
        "Licence": lineage.license or "not stated",
        "Checkpoint": lineage.checkpoint,
        CARD_MARK: lineage.checkpoint_sha256,
        "Configuration SHA-256": lineage.config_sha256 or "not recorded",
        "Data fingerprint": lineage.data_fingerprint or "not recorded",
        "Written with": versions,
    }
    parts = [
        _front_matter(target, lineage.license),
        "# Lightning-attention hybrid",
        _table(("", ""), rows.items()),
        "## Stages",
        _table(("stage", "tokens per row", "RoPE base", "tokens", "data mix"), map(_stage_row, lineage.stages)),
        "## Evaluation",
        _table(("", ""), lineage.evaluation) if lineage.evaluation else "This checkpoint was not evaluated.",
        "## Who can load it",
        "\n".join(f"- {note}" for note in notes),
        f"```{_USE[target][0]}\n{_USE[target][1].format(file=gguf_name(dtype))}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def adapter_card(lineage: Lineage, lora: LoraConfig, notes: tuple[str, ...]) -> str:
    """Return the text of the ``README.md`` beside adapters that were exported without the weights they belong to."""
    rows = {
        "Adapters": f"rank {lora.rank}, alpha {lora.alpha:g}, beside the matrices of {', '.join(lora.targets)}",
        "Stages": " -> ".join(stage.name for stage in lineage.stages),
        "Optimizer steps": f"{lineage.global_step:,}",
        "Licence": lineage.license or "not stated",
        "Checkpoint": lineage.checkpoint,
        CARD_MARK: lineage.checkpoint_sha256,
        "Data fingerprint": lineage.data_fingerprint or "not recorded",
    }
    licence = f"license: {json.dumps(lineage.license)}\n" if lineage.license else ""
    parts = [
        f"---\nlibrary_name: peft\n{licence}pipeline_tag: text-generation\n---",
        "# Adapters of a lightning-attention hybrid",
        _table(("", ""), rows.items()),
        "\n".join(f"- {note}" for note in notes),
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE", dtype="float32"), ".")\n```',
    ]
    return "\n\n".join(parts) + "\n"


_USE = {
    "hf": (
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="float32")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ),
    "text01": (
        "bash",
        "vllm serve . --mamba-cache-dtype float32    # vLLM <= 0.23\nm1 import .    # train on from here",
    ),
    "gguf": ("bash", "llama-cli -m {file} -ctk f32 -ctv f32"),
}
"""How the export is used, and the language of that text."""


def _front_matter(target: Target, license_id: str) -> str:
    library = {"hf": "library_name: transformers\n", "gguf": "library_name: gguf\n"}.get(target, "")
    licence = f"license: {json.dumps(license_id)}\n" if license_id else ""
    return f"---\n{library}{licence}pipeline_tag: text-generation\n---"


def _half_lives(model: ModelConfig, slopes: Slopes) -> str:
    """Say how long the heads of the first and the last lightning layer remember."""
    lightning = [layer for layer in range(model.num_layers) if not model.is_softmax(layer)]
    if not lightning:
        return "no lightning layer"
    ends = []
    for layer in dict.fromkeys((lightning[0], lightning[-1])):
        lives = [half_life_tokens(slope) for slope in slopes[layer]]
        ends.append(f"{_tokens(min(lives))} to {_tokens(max(lives))} tokens in layer {layer}")
    return f"half-lives of the heads {', '.join(ends)}"


def _tokens(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def _stage_row(stage: StageFacts) -> tuple[str, ...]:
    rope = "not recorded" if stage.rope_base is None else f"{stage.rope_base:g}"
    tokens = "not recorded" if stage.tokens is None else f"{stage.tokens:,}"
    return stage.name, f"{stage.row_tokens:,}", rope, tokens, stage.mix or "not recorded"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([cells[0], "|" + "---|" * len(head), *cells[1:]])
