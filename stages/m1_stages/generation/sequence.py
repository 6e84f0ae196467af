"""One answer while it is being written, on the host: when it ends, and what the thinking budget forces."""

from __future__ import annotations

import math
from collections.abc import Sequence as Tokens

from m1_stages.errors import NumericStop
from m1_stages.generation.request import Completion, Decode, FinishReason, Request, Update
from m1_stages.generation.sampling import sequence_seed
from m1_stages.generation.text import TextStream


class Sequence:
    """The ``sample``-th answer to a request.

    Attributes:
        slot: its slot in the engine, or -1 while it waits.
        read: tokens of the prompt that are in the states.
        in_flight: tokens that are being computed and that the host has not seen.
    """

    def __init__(self, number: int, sample: int, request: Request, decode: Decode | None) -> None:
        self.number, self.sample, self.request = number, sample, request
        self.seed = sequence_seed(request.sampling.seed, request.name or list(request.prompt), sample)
        self.slot, self.read, self.in_flight = -1, 0, 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.completion: Completion | None = None
        self.first_weights = ""
        self._text = TextStream(decode, request.stop_strings) if decode else None
        self._told, self._sure = 0, 0
        thinking = request.thinking
        self._opened = 0 if thinking and thinking.is_open else -1
        """Index of the first token of the reasoning, or -1."""
        self._closed = -1
        """Index of the first token behind the reasoning's last one, or -1."""
        self._forced = (
            range(len(thinking.forced)) if thinking and thinking.is_open and not thinking.budget else range(0)
        )

    @property
    def next_index(self) -> int:
        """Index of the next token to compute."""
        return len(self.tokens) + self.in_flight

    def horizon(self) -> float:
        """The tokens that may be computed before the host must look at those in flight, and at the thinking budget."""
        thinking = self.request.thinking
        if thinking is None or self._closed >= 0 or self._forced:
            return math.inf
        earliest = self._opened if self._opened >= 0 else len(self.tokens) + 1
        return earliest + thinking.budget - self.next_index

    def forced(self, count: int) -> list[int]:
        """The tokens that must be taken as the next ``count``; -1 where the model chooses."""
        if not self._forced:
            return [-1] * count
        assert self.request.thinking is not None
        text, first = self.request.thinking.forced, self._forced.start
        return [text[i - first] if i in self._forced else -1 for i in range(self.next_index, self.next_index + count)]

    def push(self, token: int, logprob: float, weights: str) -> None:
        """Take the next computed token; afterwards ``completion`` says whether the answer is finished.

        Args:
            weights: version of the weights.

        Raises:
            NumericStop: the model gave no number.
        """
        if math.isnan(logprob):
            raise NumericStop(
                f"the model's output is not a number at token {len(self.request.prompt) + len(self.tokens)}",
                where=f"request {self.number}, sample {self.sample}",
                fix="use another checkpoint: the weights of this one are damaged, or training diverged",
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._text is not None and token not in self.request.stop_ids:
            self._text.push(token, may_stop=len(self.tokens) >= self.request.min_tokens)
        self._follow_thinking()
        if reason := self._reason(token, logprob):
            self.finish(reason, weights)

    def finish(self, reason: FinishReason, weights: str) -> None:
        """End the answer."""
        if self._text is not None:
            self._text.finish()
        end = self._closed if self._closed >= 0 else len(self.tokens)
        self.completion = Completion(
            tokens=self.tokens,
            logprobs=self.logprobs,
            finish_reason=reason,
            text=self._text.text if self._text is not None else "",
            prompt_tokens=len(self.request.prompt),
            reasoning_tokens=max(0, end - self._opened) if self._opened >= 0 else 0,
            forced=range(self._forced.start, min(self._forced.stop, len(self.tokens))),
            weights=(self.first_weights or weights, weights),
        )

    def update(self) -> Update:
        """Return what is new since the last call."""
        told, self._told = self._told, len(self.tokens)
        return Update(
            request=self.number,
            sample=self.sample,
            tokens=self.tokens[told:],
            logprobs=self.logprobs[told:],
            text=self._text.take() if self._text is not None else "",
            completion=self.completion,
        )

    def _reason(self, token: int, logprob: float) -> FinishReason | None:
        request = self.request
        if token in request.stop_ids or (self._text is not None and self._text.stopped):
            return "stop"
        if request.repetition is not None:
            self._sure = self._sure + 1 if logprob > math.log(request.repetition.probability) else 0
            if self._sure >= request.repetition.tokens and len(self.tokens) >= request.min_tokens:
                return "repetition"
        return "length" if len(self.tokens) >= request.max_tokens else None

    def _follow_thinking(self) -> None:
        thinking = self.request.thinking
        if thinking is None or self._closed >= 0:
            return
        count = len(self.tokens)
        if self._opened < 0:
            self._opened = count if _ends_with(self.tokens, thinking.opening) else -1
        elif count - self._opened >= len(thinking.closing) and _ends_with(self.tokens, thinking.closing):
            self._closed = count
        if self._opened >= 0 and not self._forced and self._closed < 0 and count - self._opened >= thinking.budget:
            self._forced = range(count, count + len(thinking.forced))


def _ends_with(tokens: Tokens[int], end: Tokens[int]) -> bool:
    return bool(end) and tuple(tokens[-len(end) :]) == tuple(end)
