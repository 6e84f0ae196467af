"""Stop requests: the first signal of ``STOP_SIGNALS`` asks for a save, a second one leaves at once.

One request often arrives twice: terminals, ``timeout`` and batch systems signal the process and its group. So a second one
counts only after ``_SAME_REQUEST_S``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""A person, a batch system that needs the machine, or a terminal that is gone asks the run to stop."""
_SAME_REQUEST_S = 1.0


@contextmanager
def leaving_with_its_own_exit_code() -> Iterator[None]:
    """Around all that a process does: afterwards a stop request, or its twin, does not change how the process ends.

    Python gives signals back their default when it takes itself down, and a signal that arrives then would end a process
    that has saved and reported with -15. SIGINT is left alone, so that a person can end one that hangs there.
    """
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Context manager that catches the signals; ``received`` names the first one, or is empty.

    Args:
        on_first: called with the name of the first one, in the main thread, wherever it is; it may raise.
    """

    def __init__(
        self, signals: Sequence[signal.Signals] = STOP_SIGNALS, on_first: Callable[[str], None] = lambda name: None
    ) -> None:
        self.received = ""
        self._signals, self._on_first = signals, on_first
        self._received_at = 0.0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def asked(self) -> bool:
        """Whether a signal arrived."""
        return bool(self.received)

    def __enter__(self) -> StopRequest:
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the command shall outlive its terminal
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if self.received and handler is signal.SIG_DFL:
                continue  # the process is about to leave: the request's twin must not end it with another exit code
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
            self._on_first(self.received)
        elif time.monotonic() - self._received_at > _SAME_REQUEST_S:
            os._exit(128 + number)
