"""The options of ``m1 generate``. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from m1_stages.generation.request import Repetition, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """How prompts are answered."""

    stage: str | None = None
    checkpoint: Path | None = None
    chat: bool | None = None
    """Render texts through the chat template; None does so with a fine-tuned checkpoint. Conversations always are."""
    max_tokens: int = 256
    min_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    repetition: Repetition | None = None
    thinking_budget: int | None = None
    slots: int = 64
    context: int | None = None
    """Most tokens of a prompt and its answer together; None: the longest context that the checkpoint was trained on."""
    prefill_tokens: int = 32_768
