"""Values of events that have parts of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LaterStages:
    """The stages that a command still trains after the one that starts."""

    stages: list[str]
    cost_in_steps: float
    """What they cost without their evaluation, in steps of the stage that starts: an estimate."""
    basis: str
    """What the estimate rests on, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleMap:
    """Needle documents of every length and depth; ``[length][depth]``, means over samples."""

    lengths: list[int]
    """Tokens."""
    depths: list[float]
    samples: int
    haystack: str
    """What the needles were hidden in."""
    recall: list[list[float]]
    exact: list[list[float]]
    """Share of values that are right in every token."""
    loss: list[list[float]]
    """Mean loss of the value's tokens, nats."""
    control_recall: list[float]
    """``[length]``: the same questions with nothing hidden, what guessing gives."""
    control_loss: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLoss:
    """Loss of held-out documents by the number of tokens before the predicted one; a value per bucket."""

    first: list[int]
    """Smallest number of tokens before; a bucket ends where the next begins, the last one at the context."""
    loss: list[float]
    """Mean, nats."""
    near_loss: list[float]
    """Loss of the same tokens when the documents are cut into pieces of ``near_tokens``: without the far context."""
    tokens: list[int]
    documents: list[int]
    """Documents that reach into the bucket."""
    near_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainLoss:
    """Loss of the held-out conversations of a domain; the domain is empty for those that name none."""

    domain: str
    conversations: int
    trained_tokens: int
    loss: float
    """Mean over the trained tokens, nats."""
