"""The routes: chat completions, completions, models, weights, health."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from m1_stages.generation import Completion, Update
from m1_stages.jobs.serving.protocol import Asked, BadRequest, Reader, refused
from m1_stages.jobs.serving.service import Answers, Service

Handler = Callable[[HttpRequest], Awaitable[Response]]
_CLOSED = 499
"""The status of an answer that nobody waits for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """The weights that answer."""

    checkpoint: str
    step: int
    stage: str
    sha256: str
    """Of the checkpoint's manifest."""

    @property
    def name(self) -> str:
        """What answers repeat as their ``system_fingerprint``."""
        return f"{self.checkpoint}-{self.sha256[:12]}"


def build_app(service: Service, reader: Reader, version: Version, load: Callable[[str | int], Version]) -> Starlette:
    """Return the ASGI application.

    Args:
        version: of the weights that the engine has.
        load: called in the engine's thread with the name of a checkpoint, its step, or ``newest``; gives the engine its weights.
    """
    state = {"version": version}
    reading = ThreadPoolExecutor(1, "requests")  # one: the encoder of chats is for one thread

    async def read(request: HttpRequest, reads: Callable[[Any], Asked]) -> Asked:
        """A long body takes seconds to encode; meanwhile the streams of others go on."""
        return await asyncio.get_running_loop().run_in_executor(reading, reads, await _json(request))

    async def chat(request: HttpRequest) -> Response:
        return await _answer(request, service, reader.model, await read(request, reader.chat), chat=True)

    async def text(request: HttpRequest) -> Response:
        return await _answer(request, service, reader.model, await read(request, reader.text), chat=False)

    async def models(request: HttpRequest) -> Response:
        model = {"id": reader.model, "object": "model", "created": 0, "owned_by": "m1", "context": reader.context}
        return JSONResponse({"object": "list", "data": [{**model, "weights": asdict(state["version"])}]})

    async def weights(request: HttpRequest) -> Response:
        if request.method == "POST":
            body = await _json(request)
            if not isinstance(body, dict) or set(body) != {"checkpoint"} or type(body["checkpoint"]) not in (str, int):
                raise BadRequest('expected {"checkpoint": "newest"}, the number of a step, or the name of a checkpoint')
            state["version"] = await service.call(lambda: load(body["checkpoint"]))
        return JSONResponse(asdict(state["version"]))

    async def health(request: HttpRequest) -> Response:
        running = await service.call(lambda: True)
        return JSONResponse({"status": "ok" if running else "", "weights": state["version"].name})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _guarded(chat), methods=["POST"]),
            Route("/v1/completions", _guarded(text), methods=["POST"]),
            Route("/v1/models", _guarded(models)),
            Route("/v1/weights", _guarded(weights), methods=["GET", "POST"]),
            Route("/health", _guarded(health)),
        ],
        exception_handlers={HTTPException: _no_route},
    )


def _guarded(handler: Handler) -> Handler:
    async def guarded(request: HttpRequest) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            problem = refused(error)
            return JSONResponse(problem.body(), status_code=problem.status)

    return guarded


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = BadRequest(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(problem.body(), status_code=problem.status, headers=error.headers)


async def _json(request: HttpRequest) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":  # a browser may send this only after it asked, so no page can use the server
        raise BadRequest("the content type has to be application/json", status=415)
    try:
        return orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


async def _answer(request: HttpRequest, service: Service, model: str, asked: Asked, *, chat: bool) -> Response:
    answers = await service.submit(asked.requests)
    shape = _Shape(service, model, asked, chat=chat)
    if asked.stream:
        return StreamingResponse(_events(answers, shape), media_type="text/event-stream")
    done: dict[int, Completion] = {}

    async def collect() -> None:
        async for place, update in answers.updates():
            if update.completion is not None:
                done[shape.index(place, update)] = update.completion

    collecting, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([collecting, gone], return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=_CLOSED)
        collecting.result()
        return JSONResponse(shape.whole(done))
    finally:
        collecting.cancel()
        gone.cancel()
        answers.cancel()


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(answers: Answers, shape: _Shape) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    done: dict[int, Completion] = {}
    try:
        async for place, update in answers.updates():
            index = shape.index(place, update)
            if update.completion is not None:
                done[index] = update.completion
            yield _event(shape.piece(index, update, first=index not in begun))
            begun.add(index)
        if shape.asked.include_usage:
            yield _event(shape.usage_piece(done))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status is sent already
        yield _event(refused(error).body())
    finally:
        answers.cancel()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


class _Shape:
    """Answers in the words of OpenAI's interface."""

    def __init__(self, service: Service, model: str, asked: Asked, *, chat: bool) -> None:
        self._decode, self.asked, self._chat = service.decode, asked, chat
        self._samples = asked.requests[0].samples
        kind = "chatcmpl" if chat else "cmpl"
        self._id, self._created, self._model = f"{kind}-{uuid.uuid4().hex}", int(time.time()), model
        self._weights = service.engine.weights

    def index(self, place: int, update: Update) -> int:
        """Place of an answer among all answers to all prompts."""
        return place * self._samples + update.sample

    def whole(self, done: dict[int, Completion]) -> dict[str, Any]:
        """The body when all is finished."""
        choices = []
        for index, one in sorted(done.items()):
            said = {"message": {"role": "assistant", "content": one.text}} if self._chat else {"text": one.text}
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._logprobs(one.tokens, one.logprobs),
                    "finish_reason": _reason(one),
                }
            )
        self._weights = done[max(done)].weights[1]
        return self._head("chat.completion" if self._chat else "text_completion") | {
            "choices": choices,
            "usage": self._usage(done),
        }

    def piece(self, index: int, update: Update, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        if update.completion is not None:
            self._weights = update.completion.weights[1]
        role = {"role": "assistant"} if first else {}
        said = {"delta": {**role, "content": update.text}} if self._chat else {"text": update.text}
        choice = {
            "index": index,
            **said,
            "logprobs": self._logprobs(update.tokens, update.logprobs),
            "finish_reason": _reason(update.completion) if update.completion else None,
        }
        return self._head("chat.completion.chunk" if self._chat else "text_completion") | {"choices": [choice]}

    def usage_piece(self, done: dict[int, Completion]) -> dict[str, Any]:
        """The last event of a stream that asked for it."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head(kind) | {"choices": [], "usage": self._usage(done)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._weights,
        }

    def _usage(self, done: dict[int, Completion]) -> dict[str, Any]:
        read = sum(len(request.prompt) for request in self.asked.requests)
        written = sum(len(one.tokens) for one in done.values())
        reasoning = sum(one.reasoning_tokens for one in done.values())
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _logprobs(self, tokens: list[int], logprobs: list[float]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        texts = [self._decode([token]) for token in tokens]
        if not self._chat:
            return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": None}
        content: list[dict[str, Any]] = [
            {"token": text, "logprob": value, "bytes": None, "top_logprobs": []}
            for text, value in zip(texts, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


def _reason(done: Completion) -> str:
    return "stop" if done.finish_reason == "stop" else "length"
