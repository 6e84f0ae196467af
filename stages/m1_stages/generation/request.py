"""What is asked of the engine, and what it answers: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from m1_stages.errors import ConfigError

FinishReason = Literal["stop", "length", "repetition", "cancelled"]
Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text; bytes that are no UTF-8 become U+FFFD."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen. The probabilities are those of ``logits / temperature``.

    Raises:
        ConfigError: a value that no distribution has.
    """

    temperature: float = 1.0
    """0 takes the likeliest token. Others are 1e-4 to 1e4: beyond, ``logits / temperature`` leaves the range of fp32."""
    top_k: int = 0
    """Only the ``top_k`` likeliest tokens; 0: all. Ties with the last of them stay in."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens that together have at least this probability, after ``top_k``. Ties stay in."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, good, want in (
            (
                "temperature",
                self.temperature,
                self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
                "0 (greedy), or 0.0001 to 10,000",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (off) or more, below 2^31"),
        ):
            if not good:
                raise ConfigError(f"{name} is {value}; it has to be {want}", where=f"sampling, {name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """A budget for reasoning tokens.

    Counting begins behind ``opening``, wherever it first appears in the answer, or at the answer's first token when the prompt
    ends inside of the reasoning. When ``closing`` has not appeared after ``budget`` tokens, ``forced`` is written, and the
    answer goes on from there.
    """

    budget: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    forced: tuple[int, ...]
    """Ends with ``closing``, or holds it."""
    is_open: bool = False
    """Whether the prompt ends inside of the reasoning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repetition:
    """Ends an answer that goes in circles: ``tokens`` consecutive tokens, each with more than ``probability``.

    MiniMax-M1 (arXiv 2506.13585, section 3.1) uses 3,000 tokens above 0.99. The probability is the model's own, at temperature 1.
    """

    tokens: int = 3000
    probability: float = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt, and how it is to be answered.

    Raises:
        ConfigError: values that contradict each other.
    """

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int
    """Most tokens of an answer, those of the reasoning included."""
    min_tokens: int = 0
    """Before so many tokens ``stop_ids`` are not chosen, and neither stop strings nor ``repetition`` end the answer."""
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    """Answers to this prompt; each has a seed of its own."""
    stop_ids: frozenset[int] = frozenset()
    """An answer ends with one of these tokens, which is its last one."""
    stop_strings: tuple[str, ...] = ()
    """An answer ends with the token in which one of these texts ends; needs an engine that can decode."""
    repetition: Repetition | None = None
    thinking: Thinking | None = None
    name: str = ""
    """Takes the place of the prompt's tokens in the seed. Two requests with the same prompt and seed get the same answers."""

    def __post_init__(self) -> None:
        for bad, what in (
            (not len(self.prompt), "the prompt has no tokens"),
            (self.max_tokens < 1, f"max_tokens is {self.max_tokens}; it has to be 1 or more"),
            (
                not 0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {self.min_tokens}; it has to be 0 to max_tokens ({self.max_tokens})",
            ),
            (self.samples < 1, f"samples is {self.samples}; it has to be 1 or more"),
            ("" in self.stop_strings, "a stop string is empty"),
            (
                self.thinking is not None and (self.thinking.budget < 0 or not self.thinking.closing),
                "a thinking budget has to be 0 or more, and needs a closing text",
            ),
            (
                self.repetition is not None
                and not (self.repetition.tokens >= 1 and 0 < self.repetition.probability < 1),
                "the repetition stop needs 1 token or more, and a probability between 0 and 1",
            ),
        ):
            if bad:
                raise ConfigError(what, where="request")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A finished answer."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token, natural logarithm, fp32: the probability that the model gives it at temperature 1, unfiltered."""
    finish_reason: FinishReason
    text: str
    """The text without the stop id or the stop string that ended it; empty when the engine cannot decode."""
    prompt_tokens: int
    reasoning_tokens: int
    """Tokens between the opening and the closing of the reasoning; 0 without ``Thinking``."""
    forced: range
    """Indices of the tokens that the thinking budget wrote in place of the model."""
    weights: tuple[str, str]
    """Version of the engine's weights when the prompt was read, and when the answer was finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What is new of one answer since the last step."""

    request: int
    """What ``Engine.submit`` returned."""
    sample: int
    tokens: list[int]
    logprobs: list[float]
    text: str
    """New text that no later token can change; empty when the engine cannot decode."""
    completion: Completion | None
    """Set in the last update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Sizes of an engine.

    Raises:
        ConfigError: a size below 1.
    """

    slots: int = 64
    """Answers that are written at the same time."""
    capacity: int
    """Most tokens of a prompt and its answer together."""
    prefill_tokens: int = 32_768
    """Prompt tokens that are read between two blocks of decoding steps; a longer prompt is read in pieces."""
    steps: int = 8
    """Decoding steps that a CUDA device takes before the host looks at their tokens."""

    def __post_init__(self) -> None:
        for name in ("slots", "capacity", "prefill_tokens", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it has to be 1 or more", where="engine options")
