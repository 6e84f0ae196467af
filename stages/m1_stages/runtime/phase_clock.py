"""Adds up where the wall time of a process goes: the share of its steps is what is called goodput."""

from __future__ import annotations

import time
from collections.abc import Callable


class PhaseClock:
    """Seconds of each phase of this process; every moment belongs to one, the first is "start".

    Args:
        running_s: seconds that the process has run already.
    """

    def __init__(self, running_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._phase = clock, "start"
        self._entered = clock() - running_s
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Count the time from now on as that of ``phase``."""
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._entered
        self._phase, self._entered = phase, now

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase until now, in the order in which they were first entered."""
        self.enter(self._phase)
        return dict(self._seconds)


def process_age() -> float:
    """Seconds since this process was started, imports included; up to one too many: a boot is dated in whole seconds."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())
