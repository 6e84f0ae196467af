"""What a body of OpenAI's interface asks for. A parameter that cannot be honoured is refused, never ignored. No torch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from m1_data.chat.conversations import conversation_of
from m1_stages.errors import CheckpointError, ConfigError, DataError, M1Error
from m1_stages.generation.prompts import Prompt, PromptEncoder
from m1_stages.generation.request import Request, Sampling

MOST_SAMPLES = 128
_SHARED: dict[str, tuple[type, ...]] = {
    "model": (str,), "max_tokens": (int,), "temperature": (int, float), "top_p": (int, float), "n": (int,), "seed": (int,),
    "stop": (str, list), "stream": (bool,), "stream_options": (dict,), "top_k": (int,), "min_tokens": (int,),
}  # fmt: skip
_CHAT = {
    **_SHARED, "messages": (list,), "max_completion_tokens": (int,), "logprobs": (bool,), "thinking_budget": (int,),
}  # fmt: skip
_TEXT = {**_SHARED, "prompt": (str, list), "logprobs": (int,)}
_WITHOUT_EFFECT: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_logprobs": 0, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"}, "best_of": 1, "echo": False, "suffix": "", "store": False,
}  # fmt: skip
"""Parameters that are known but not supported, with the value that changes nothing and is accepted."""


class BadRequest(Exception):
    """A request that is refused, in the words and the shape of OpenAI's interface."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A body that was understood."""

    requests: list[Request]
    """One for each prompt."""
    stream: bool
    include_usage: bool
    logprobs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Turns bodies into requests of the engine.

    Args:
        model: the only name of a model that is served.
        context: most tokens of a prompt and its answer together.
    """

    encoder: PromptEncoder
    model: str
    context: int

    def chat(self, body: Any) -> Asked:
        """Read a body of ``/v1/chat/completions``.

        Raises:
            BadRequest: a value of another kind, or a parameter that is unknown or not supported.
            ConfigError: a value out of range.
            DataError: messages that are no conversation.
        """
        given = self._checked(body, _CHAT)
        if "messages" not in given:
            raise BadRequest("messages is missing", param="messages")
        if "max_tokens" in given and "max_completion_tokens" in given:
            raise BadRequest("give max_tokens or max_completion_tokens, not both", param="max_tokens")
        conversation = conversation_of({"messages": given["messages"]}, "messages")
        if conversation.messages[-1].role == "assistant":
            raise BadRequest("the last message is the assistant's: there is nothing to answer", param="messages")
        ids = self.encoder.encode(Prompt(where="messages", conversation=conversation), chat=True)
        most = given.get("max_completion_tokens", given.get("max_tokens", max(1, self.context - len(ids))))
        request = self._request(given, ids, most, self.encoder.stop_ids(chat=True))
        if "thinking_budget" in given:
            request = replace(request, thinking=self.encoder.thinking(given["thinking_budget"], ids))
        return self._asked(given, [request], logprobs=given.get("logprobs", False))

    def text(self, body: Any) -> Asked:
        """Read a body of ``/v1/completions``; raises what ``chat`` raises."""
        given = self._checked(body, _TEXT)
        if given.get("logprobs", 0) != 0:
            raise BadRequest(
                "logprobs has to be 0: the log-probabilities of the chosen tokens, without those of others",
                param="logprobs",
                code="unsupported_value",
            )
        stops, most = self.encoder.stop_ids(chat=False), given.get("max_tokens", 16)
        requests = [self._request(given, ids, most, stops) for ids in self._prompts(given.get("prompt"))]
        return self._asked(given, requests, logprobs="logprobs" in given)

    def _checked(self, body: Any, known: dict[str, tuple[type, ...]]) -> dict[str, Any]:
        """The parameters that are not null."""
        if not isinstance(body, dict):
            raise BadRequest("the body has to be a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        for name, value in list(given.items()):
            if name in known:
                if not isinstance(value, known[name]) or (isinstance(value, bool) and bool not in known[name]):
                    wanted = " or ".join(kind.__name__ for kind in known[name])
                    raise BadRequest(
                        f"{name} is {type(value).__name__}; it has to be {wanted}", param=name, code="invalid_type"
                    )
            elif name not in _WITHOUT_EFFECT:
                raise BadRequest(f"there is no parameter {name!r} here", param=name, code="unknown_parameter")
            elif given.pop(name) != _WITHOUT_EFFECT[name]:
                raise BadRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
        if given.get("model", self.model) != self.model:
            raise BadRequest(
                f"there is no model {given['model']!r}; this server has {self.model!r}",
                param="model",
                code="model_not_found",
                status=404,
            )
        if not 1 <= given.get("n", 1) <= MOST_SAMPLES:
            raise BadRequest(f"n is {given['n']}; it has to be 1 to {MOST_SAMPLES}", param="n")
        return given

    def _request(self, given: dict[str, Any], ids: list[int], most: int, stop_ids: frozenset[int]) -> Request:
        stop = given.get("stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) for text in stops):
            raise BadRequest("stop has to be a text, or a list of texts", param="stop", code="invalid_type")
        if len(ids) + most > self.context:
            raise BadRequest(
                f"the prompt has {len(ids):,} tokens and the answer up to {most:,}, together more than the context of "
                f"{self.context:,}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return Request(
            prompt=ids,
            max_tokens=most,
            min_tokens=given.get("min_tokens", 0),
            sampling=Sampling(
                temperature=given.get("temperature", 1.0),
                top_k=given.get("top_k", 0),
                top_p=given.get("top_p", 1.0),
                seed=given.get("seed", secrets.randbits(62)),
            ),
            samples=given.get("n", 1),
            stop_ids=stop_ids,
            stop_strings=tuple(stops),
        )

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """The tokens of a text, of a list of texts, of a list of token ids, or of a list of such lists."""
        several = prompt if isinstance(prompt, list) else [prompt]
        if several and all(type(token) is int for token in several):
            return [several]
        found = []
        for number, one in enumerate(several):
            if isinstance(one, str):
                found.append(self.encoder.encode(Prompt(where=f"prompt {number}", text=one), chat=False))
            elif isinstance(one, list) and one and all(type(token) is int for token in one):
                found.append(one)
            else:
                raise BadRequest("prompt has to be a text, token ids, or a list of these", param="prompt")
        if not found:
            raise BadRequest("prompt has no text", param="prompt")
        return found

    def _asked(self, given: dict[str, Any], requests: list[Request], *, logprobs: bool) -> Asked:
        options = given.get("stream_options", {})
        if unknown := set(options) - {"include_usage"}:
            raise BadRequest(
                f"there is no parameter {min(unknown)!r} in stream_options",
                param="stream_options",
                code="unknown_parameter",
            )
        if not isinstance(options.get("include_usage", False), bool):
            raise BadRequest("include_usage has to be true or false", param="stream_options", code="invalid_type")
        if options and not given.get("stream"):
            raise BadRequest("stream_options needs stream", param="stream_options")
        return Asked(
            requests=requests,
            stream=given.get("stream", False),
            include_usage=options.get("include_usage", False),
            logprobs=logprobs,
        )


def refused(error: Exception) -> BadRequest:
    """Return the answer to a request that failed with ``error``."""
    if isinstance(error, BadRequest):
        return error
    words = ": ".join(part for part in (error.where, error.what) if part) if isinstance(error, M1Error) else repr(error)
    if isinstance(error, CheckpointError):
        return BadRequest(words, code="checkpoint_unusable", status=409)
    return BadRequest(words, status=400 if isinstance(error, ConfigError | DataError) else 503)
