"""The section ``sft`` of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from m1_data.spec import REFLECTION_PATTERNS
from m1_stages.config.change_rule import WhenChanged


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRun:
    """A named fine-tuning, ``[[sft.runs]]``: the section's values, except for those it gives itself."""

    name: str
    overrides: Mapping[str, Any]
    """Values of ``SftConfig`` by key, of the types there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """Supervised fine-tuning on chain-of-thought conversations."""

    data: Annotated[
        tuple[str, ...],
        "files of conversations: JSON Lines or a JSON array (plain, .gz, .zst, .bz2), Parquet, Arrow, or a folder that "
        "datasets saved",
    ] = ()
    dialect: Annotated[
        Literal["auto", "openai", "sharegpt", "alpaca", "prompt-completion"],
        "form of the rows; auto takes that of each file's first row",
    ] = "auto"
    ignored_keys: Annotated[tuple[str, ...], "keys of the rows that are taken out before anything looks at them"] = ()
    bad_rows: Annotated[
        Literal["error", "skip"], "rows that are no conversation: stop, or leave them out and count them by reason"
    ] = "error"
    earlier_reasoning: Annotated[
        Literal["keep", "strip", "split"],
        "reasoning before the last user's message: keep it, take it out, or make a sample of each round, without the "
        "reasoning of the rounds before",
    ] = "keep"
    weights: Annotated[
        dict[str, float],
        "by an entry of data: how often its conversations are drawn in a pass; 2 is twice, 0.5 every second one, else once",
    ] = field(default_factory=dict)
    held_out: Annotated[
        float, "share of the conversations that is never trained; its loss by domain is measured after training"
    ] = 0.0
    reflection_patterns: Annotated[
        tuple[str, ...], "words and phrases with which reasoning checks itself; they are counted in what is trained"
    ] = REFLECTION_PATTERNS
    reflection_min_per_1k_tokens: Annotated[
        float, "conversations with fewer matches of the patterns in 1,000 trained tokens are left out"
    ] = 0.0
    reflection_weight: Annotated[
        float, "factor on the weight of conversations in which at least one pattern matches"
    ] = 1.0
    processes: Annotated[
        int, "processes that tokenize the conversations; 0: one per core, 16 at most", WhenChanged.NO_EFFECT
    ] = 0
    base_stage: Annotated[
        str,
        "what is fine-tuned: the final checkpoint of a stage, import for an imported model, or (in a run) another run",
    ] = "1m"
    context_tokens: Annotated[int, "tokens per packed row at full scale"] = 32_768
    epochs: Annotated[float, "passes over the conversations"] = 2.0
    global_batch_tokens: Annotated[int, "tokens per optimizer step"] = 1_048_576
    micro_batch_rows: Annotated[int, "rows per forward pass on each data-parallel rank", WhenChanged.NO_EFFECT] = 1
    lr_peak: Annotated[float, "learning rate after warm-up", WhenChanged.APPLIED] = 1e-5
    lr_final: Annotated[float, "learning rate at the end (cosine)", WhenChanged.APPLIED] = 1e-6
    lr_warmup_share: Annotated[float, "share of the steps spent on linear warm-up", WhenChanged.APPLIED] = 0.03
    chat_template: Annotated[
        str, "Jinja file, or m1 for the one shipped here; empty: the tokenizer's own, else the shipped one"
    ] = ""
    date: Annotated[
        str, "day that a template's strftime_now writes, such as 2026-01-31; empty refuses such templates"
    ] = ""
    over_length: Annotated[Literal["error", "drop", "truncate"], "conversations longer than a row"] = "error"
    max_dropped_share: Annotated[
        float, "stop when more than this share of the conversations would be dropped", WhenChanged.NO_EFFECT
    ] = 0.1
    lora_rank: Annotated[
        int, "rank of the low-rank adapters (LoRA) that are trained in place of the weights; 0 trains all weights"
    ] = 0
    lora_alpha: Annotated[float, "adapters are multiplied by lora_alpha / lora_rank"] = 16.0
    lora_targets: Annotated[
        tuple[str, ...],
        "whose matrices have adapters: lightning and softmax (all projections of these layers), router",
    ] = ("lightning", "softmax")
    runs: Annotated[
        tuple[SftRun, ...],
        "named fine-tunings, tables [[sft.runs]]: each has a name, and any key of this section that is another for it",
        WhenChanged.NO_EFFECT,
    ] = ()
