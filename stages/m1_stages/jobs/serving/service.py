"""One thread runs the engine; the handlers of requests, in an event loop of another thread, talk to it by queues."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from m1_stages.errors import EnvironmentProblem
from m1_stages.generation import Request, Update
from m1_stages.generation.request import Decode

if TYPE_CHECKING:  # it imports Megatron-Core, and the device is chosen first
    from m1_stages.generation.engine import Engine

_IDLE_SECONDS = 0.1
"""How long an idle engine waits for a command before it looks whether it shall stop."""


class Answers:
    """The answers to some requests while they are being written; used in the event loop."""

    def __init__(
        self, service: Service, numbers: list[int], samples: int, inbox: asyncio.Queue[Update | Exception]
    ) -> None:
        self._service, self._inbox, self._open = service, inbox, samples
        self._places = {number: place for place, number in enumerate(numbers)}

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield the place of each update's request in the list, and the update, until all answers are finished.

        Raises:
            Exception: what stopped the engine.
        """
        while self._open:
            update = await self._inbox.get()
            if isinstance(update, Exception):
                raise update
            self._open -= update.completion is not None
            yield self._places[update.request], update

    def cancel(self) -> None:
        """End what is unfinished."""
        if self._open:
            self._service.cancel(list(self._places))


class Service:
    """The engine, and who waits for which of its answers."""

    def __init__(self, engine: Engine, decode: Decode) -> None:
        self.engine, self.decode = engine, decode
        self._commands: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._listeners: dict[int, tuple[Callable[[Update | Exception], None], int]] = {}
        """By number of a request: where its updates go, and its unfinished answers."""
        self._ended: Exception | None = None

    def run(self, stop: Callable[[], bool]) -> None:
        """Serve until ``stop`` says so; this is the engine's thread. Whoever waits then gets an error.

        Raises:
            M1Error: what ``Engine.step`` raises.
        """
        ended: Exception = EnvironmentProblem("the server is stopping")
        try:
            while not stop():
                self._obey()
                for update in self.engine.step():
                    self._send(update)
        except Exception as error:
            ended = error
            raise
        finally:
            self._ended = ended
            for listener, _ in self._listeners.values():
                listener(ended)
            self._refuse_all(ended)

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` in the engine's thread, between two steps, and return what it returns."""
        future: Future[Any] = Future()
        self._commands.put((future, function))
        if self._ended is not None:  # nobody may be left to take it
            self._refuse_all(self._ended)
        return await asyncio.wrap_future(future)

    async def submit(self, requests: list[Request]) -> Answers:
        """Queue all requests, or none of them.

        Raises:
            ConfigError: what ``Engine.submit`` raises.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Update | Exception] = asyncio.Queue()

        def listener(update: Update | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(inbox.put_nowait, update)

        def submit() -> list[int]:
            numbers: list[int] = []
            try:
                for request in requests:
                    numbers.append(self.engine.submit(request))
                    self._listeners[numbers[-1]] = (listener, request.samples)
            except Exception:
                self._cancel(numbers)
                raise
            return numbers

        numbers = await self.call(submit)
        return Answers(self, numbers, sum(request.samples for request in requests), inbox)

    def cancel(self, numbers: list[int]) -> None:
        """End requests; may be called in any thread, and for requests that are finished."""
        self._commands.put((Future(), lambda: self._cancel(numbers)))

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._listeners.pop(number, None) is not None:
                self.engine.cancel(number)

    def _obey(self) -> None:
        """Run the commands that wait; with nothing else to do, wait for one."""
        try:
            future, function = self._commands.get(block=self.engine.is_idle, timeout=_IDLE_SECONDS)
            while True:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function())
                    except Exception as error:
                        future.set_exception(error)
                future, function = self._commands.get_nowait()
        except queue.Empty:
            return

    def _refuse_all(self, reason: Exception) -> None:
        try:
            while True:
                future, _ = self._commands.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(reason)
        except queue.Empty:
            return

    def _send(self, update: Update) -> None:
        if update.request not in self._listeners:
            return
        listener, unfinished = self._listeners[update.request]
        unfinished -= update.completion is not None
        if unfinished:
            self._listeners[update.request] = (listener, unfinished)
        else:
            del self._listeners[update.request]
        listener(update)
