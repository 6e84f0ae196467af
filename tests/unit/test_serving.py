"""``m1 generate --serve``: OpenAI's interface over the engine; what cannot be honoured is refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.generating import GREEDY, engine_on, tiny_model

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient

from m1_stages.errors import CheckpointError, EnvironmentProblem, NumericStop
from m1_stages.generation import Request, Sampling
from m1_stages.jobs.serving.app import Version, build_app
from m1_stages.jobs.serving.protocol import Reader
from m1_stages.jobs.serving.service import Service

CONTEXT = 100
FIRST = Version(checkpoint="step_00000001", step=1, stage="32k", sha256="a" * 64)
SECOND = Version(checkpoint="step_00000002", step=2, stage="32k", sha256="b" * 64)


class Letters:
    """Token ids are bytes below 250; a chat is the last message between two marks."""

    def encode(self, prompt: Any, *, chat: bool) -> list[int]:
        text = prompt.conversation.messages[-1].content if prompt.conversation else prompt.text
        return [1, *text.encode(), 2] if chat else list(text.encode())

    def stop_ids(self, *, chat: bool) -> frozenset[int]:
        return frozenset([0])

    def decode(self, ids: Any) -> str:
        return "".join(chr(0x100 + token) for token in ids)


class Served:
    """A service in a thread, and a client."""

    def __init__(self, model: Any) -> None:
        letters: Any = Letters()
        self.engine = engine_on(model, decode=letters.decode, slots=4, capacity=CONTEXT)
        self.engine.weights_changed(FIRST.name)
        self.service = Service(self.engine, letters.decode)
        self.loaded: list[tuple[str | int, bool]] = []
        self.app = build_app(self.service, Reader(encoder=letters, model="run", context=CONTEXT), FIRST, self._load)
        self.client = TestClient(self.app)
        self.stopped, self.error = False, ""
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run(lambda: self.stopped)
        except NumericStop as error:
            self.error = error.what

    def _load(self, name: str | int) -> Version:
        self.loaded.append((name, threading.current_thread() is self.thread))
        if name not in ("newest", SECOND.step):
            raise CheckpointError(f"there is no checkpoint {name!r}")
        self.engine.weights_changed(SECOND.name)
        return SECOND

    def close(self) -> None:
        self.stopped = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def ask(self, path: str, **body: Any) -> Any:
        done = self.client.post(f"/v1/{path}", json=body)
        assert done.status_code == 200, done.text
        return done.json()

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        done = self.client.post(f"/v1/{path}", json={**body, "stream": True})
        assert done.headers["content-type"].startswith("text/event-stream")
        *parts, last, empty = done.text.split("\n\n")
        assert (last, empty) == ("data: [DONE]", "")
        return [json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with tiny_model() as (built, _):
        yield built


@pytest.fixture
def served(model: Any) -> Iterator[Served]:
    started = Served(model)
    yield started
    started.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_is_what_the_engine_writes(served: Served, model: Any) -> None:
    asked = Request(prompt=[1, *b"hello", 2], max_tokens=9, sampling=Sampling(seed=5, top_p=0.9), samples=2)
    ((first, second),) = engine_on(model, decode=Letters().decode).generate([asked])
    body = {"messages": user("hello"), "max_tokens": 9, "seed": 5, "top_p": 0.9, "n": 2, "logprobs": True}
    done = served.ask("chat/completions", **body, model="run", frequency_penalty=0, user=None)
    for choice, expected in zip(done["choices"], (first, second), strict=True):
        assert choice["message"] == {"role": "assistant", "content": expected.text}
        assert choice["finish_reason"] == "length"
        said = choice["logprobs"]["content"]
        assert "".join(one["token"] for one in said) == expected.text
        assert [one["logprob"] for one in said] == pytest.approx(expected.logprobs, abs=1e-5)
    assert done["usage"]["prompt_tokens"] == 7
    assert done["usage"]["completion_tokens"] == 18
    assert (done["object"], done["model"], done["system_fingerprint"]) == ("chat.completion", "run", FIRST.name)
    *events, usage = served.events("chat/completions", **body, stream_options={"include_usage": True})
    for index, expected in enumerate((first, second)):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in mine) == expected.text
        assert [choice["delta"].get("role") for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert sum(len(choice["logprobs"]["content"]) for choice in mine) == 9
    assert (usage["choices"], usage["usage"]) == ([], done["usage"])
    drawn = {served.ask("completions", prompt="hello")["choices"][0]["text"] for _ in range(3)}
    assert len(drawn) == 3, "without a seed each answer is another one"


def test_several_prompts_and_stop_texts(served: Served, model: Any) -> None:
    engine = engine_on(model, decode=Letters().decode)
    texts = [list(b"one"), list(b"three")]
    plain = [one.text for (one,) in engine.generate([Request(prompt=p, max_tokens=16, sampling=GREEDY) for p in texts])]
    done = served.ask("completions", prompt=["one", "three"], temperature=0, logprobs=0)
    assert [(c["index"], c["text"]) for c in done["choices"]] == [(0, plain[0]), (1, plain[1])]
    assert len(done["choices"][1]["logprobs"]["token_logprobs"]) == 16
    assert served.ask("completions", prompt=texts, temperature=0)["choices"][1]["text"] == plain[1]
    twice = served.ask("completions", prompt=texts, temperature=0, n=2)["choices"]
    assert [(c["index"], c["text"]) for c in twice] == [(i, plain[i // 2]) for i in range(4)]
    stopped = served.ask("completions", prompt=texts[0], temperature=0, stop=[plain[0][4:6]])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (plain[0][: plain[0].index(plain[0][4:6])], "stop")
    assert (
        "".join(e["choices"][0]["text"] for e in served.events("completions", prompt="one", temperature=0)) == plain[0]
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("completions", {"prompt": "a", "foo": 1}, 400, "foo", "there is no parameter 'foo'"),
        ("completions", {"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias", "logit_bias is not supported"),
        ("completions", {"prompt": "a", "logprobs": 2}, 400, "logprobs", "has to be 0"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "model", "there is no model 'gpt'; this server has 'run'"),
        ("completions", {"prompt": "a", "n": True}, 400, "n", "n is bool; it has to be int"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n", "n is 0"),
        ("completions", {"prompt": "a", "top_p": 0}, 400, None, "top_p is 0"),
        ("completions", {"prompt": "a", "max_tokens": 100}, 400, "max_tokens", "context of 100"),
        ("completions", {"prompt": [250]}, 400, None, "the token ids of the prompt go from 250 to 250"),
        ("completions", {"prompt": []}, 400, "prompt", "prompt has no text"),
        ("completions", {"prompt": "a", "stop": [1]}, 400, "stop", "stop has to be a text"),
        ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options", "true"),
        ("completions", {"prompt": "a", "temperature": 1e-45}, 400, None, "temperature is 1e-45"),
        ("completions", {"prompt": "a", "top_k": 2**63}, 400, None, "top_k is 9223372036854775808"),
        ("chat/completions", {}, 400, "messages", "messages is missing"),
        ("chat/completions", {"messages": user("a"), "tools": [{}]}, 400, "tools", "tools is not supported"),
        ("chat/completions", {"messages": user("a"), "top_logprobs": 3}, 400, "top_logprobs", "not supported"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, None, "messages"),
        ("chat/completions", [], 400, None, "the body has to be a JSON object"),
        ("weights", {"checkpoint": None}, 400, None, "expected"),
        ("weights", {"checkpoint": True}, 400, None, "expected"),
        ("embeddings", {}, 404, None, "POST /v1/embeddings: Not Found"),
        ("models", {}, 405, None, "POST /v1/models: Method Not Allowed"),
        ("weights", {"checkpoint": 7}, 409, None, "there is no checkpoint 7"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(
    served: Served, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    done = served.client.post(f"/v1/{path}", json=body)
    error = done.json()["error"]
    assert (done.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert message in error["message"]
    if status not in (404, 405):
        assert served.client.post(f"/v1/{path}", content=b"{").json()["error"]["message"].startswith("the content type")


def test_states_without_room_are_told_with_their_size(model: Any) -> None:
    with pytest.raises(EnvironmentProblem, match=r"10,000,000,000,000 tokens need \d+.\d\d GiB") as told:
        engine_on(model, slots=4, capacity=10**13)
    assert (told.value.where, "--slots" in told.value.fix) == ("CPU", True)


def test_new_weights_are_loaded_between_two_steps_and_named(served: Served) -> None:
    assert served.client.get("/v1/weights").json()["step"] == 1
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "run"
    assert served.ask("weights", checkpoint=2) == {
        "checkpoint": SECOND.checkpoint,
        "step": 2,
        "stage": "32k",
        "sha256": "b" * 64,
    }
    assert served.ask("weights", checkpoint="newest")["step"] == 2
    assert served.loaded == [(SECOND.step, True), ("newest", True)], "in the thread of the engine"
    assert served.client.get("/health").json() == {"status": "ok", "weights": SECOND.name}
    assert served.ask("completions", prompt="a")["system_fingerprint"] == SECOND.name


def test_a_stream_names_the_weights_that_wrote_its_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, working = served.engine.step, []

    def step() -> Any:
        if not served.engine.is_idle:
            working.append(1)
        if len(working) == 4:
            served.engine.weights_changed(SECOND.name)
        return whole()

    monkeypatch.setattr(served.engine, "step", step)
    events = served.events("completions", prompt="a", max_tokens=9, temperature=0)
    assert [events[i]["system_fingerprint"] for i in (0, -1)] == [FIRST.name, SECOND.name]


def test_who_leaves_frees_the_slots(served: Served) -> None:
    for stream in (False, True):
        body = json.dumps({"prompt": "a", "max_tokens": CONTEXT - 1, "n": 128, "stream": stream}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
        sent: list[Any] = []

        async def receive(incoming: list[Any] = incoming) -> Any:
            await asyncio.sleep(0.01)
            return incoming.pop(0) if incoming else await asyncio.Future()

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "asgi": {"version": "3.0"},
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        asyncio.run(asyncio.wait_for(served.app(scope, receive, send), 20))
        assert sent[0]["status"] == (200 if stream else 499)
        until = time.monotonic() + 3
        while not served.engine.is_idle and time.monotonic() < until:
            time.sleep(0.02)
        assert served.engine.is_idle, "12,672 tokens would take far longer"
    assert served.ask("completions", prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_long_body_delays_no_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is encoded, which ends here when the other stream has ended, events go out in the same loop."""
    whole, has_ended = Letters.encode, threading.Event()
    waited: list[bool] = []

    def encode(letters: Letters, prompt: Any, *, chat: bool) -> list[int]:
        if prompt.text == "long":
            waited.append(has_ended.wait(5))
        return whole(letters, prompt, chat=chat)

    monkeypatch.setattr(Letters, "encode", encode)

    async def stream(prompt: str, begun: asyncio.Event) -> list[bytes]:
        sent: list[bytes] = []
        body = json.dumps({"prompt": prompt, "max_tokens": 40, "stream": True, "temperature": 0}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return incoming.pop() if incoming else await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            begun.set()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "asgi": {"version": "3.0"},
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        await served.app(scope, receive, send)
        return sent

    async def both() -> tuple[list[bytes], list[bytes]]:
        begun = asyncio.Event()
        short = asyncio.ensure_future(stream("short", begun))
        await begun.wait()
        long = asyncio.ensure_future(stream("long", asyncio.Event()))
        first = await short
        has_ended.set()
        return first, await long

    for sent in asyncio.run(asyncio.wait_for(both(), 30)):
        assert b"".join(sent).endswith(b"data: [DONE]\n\n")
    assert waited == [True]


def test_who_waits_when_the_engine_fails_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise NumericStop("the model's output is not a number")

    monkeypatch.setattr(served.engine, "step", lambda: [] if served.engine.is_idle else fail())
    for _ in range(2):
        done = served.client.post("/v1/completions", json={"prompt": "a"})
        assert (done.status_code, done.json()["error"]["type"]) == (503, "server_error")
        assert "not a number" in done.json()["error"]["message"]
    assert served.client.get("/health").status_code == 503
    served.thread.join(5)
    assert served.error == "the model's output is not a number"
