"""Stop requests: the first SIGTERM, SIGINT or SIGUSR1 asks for a save, a second one leaves at once.

One request often arrives twice: terminals, ``timeout`` and batch systems signal the process and its group. So a second one
counts only after ``_SAME_REQUEST_S``.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Context manager that catches the signals; ``received`` names the first one, or is empty."""

    def __init__(self) -> None:
        self.received = ""
        self._received_at = 0.0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def asked(self) -> bool:
        """Whether a signal arrived."""
        return bool(self.received)

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._received_at > _SAME_REQUEST_S:
            os._exit(128 + number)
