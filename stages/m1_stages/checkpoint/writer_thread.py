"""The thread that writes a checkpoint while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import IntEnum

from m1_stages.checkpoint.snapshot import Files
from m1_stages.runtime.collectives import reason_of


class Progress(IntEnum):
    """The progress of a writer. Over several ranks the largest counts: failures are reported after all ranks finish."""

    DONE = 0
    FAILED = 1
    WRITING = 2
    STUCK = 3


class Writer:
    """Runs ``write`` in a thread and watches its progress.

    Args:
        write: called with a function that it calls after every piece of work.
        deadline_s: seconds without progress after which the writer counts as stuck. Only the time between two looks counts,
            and at most a quarter of the deadline each time: a process that was suspended is not stuck.
    """

    def __init__(self, write: Callable[[Callable[[], None]], Files], *, deadline_s: float) -> None:
        self._write, self._deadline_s = write, deadline_s
        self._pieces, self._seen, self._waited, self._looked = 0, 0, 0.0, time.monotonic()
        self.files: Files = {}
        self.seconds = 0.0
        """That it took to write them."""
        self.reason = "the writer ended without a reason"
        """The reason why it failed; empty when it did not."""
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still exists; nothing can end one that waits inside the kernel."""
        return self._thread.is_alive()

    def progress(self, wait_s: float = 0.0) -> Progress:
        """Return the writer's progress, after waiting for it up to ``wait_s`` seconds."""
        if wait_s:
            self._thread.join(wait_s)
        now = time.monotonic()
        self._waited += min(now - self._looked, self._deadline_s / 4)
        self._looked = now
        if self._pieces != self._seen:
            self._seen, self._waited = self._pieces, 0.0
        if self.alive:
            return Progress.STUCK if self._waited > self._deadline_s else Progress.WRITING
        return Progress.FAILED if self.reason else Progress.DONE

    def stuck_for(self) -> float:
        """Seconds without progress."""
        return self._waited

    def _run(self) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        began = time.monotonic()
        try:
            self.files, self.reason = self._write(self._report_progress), ""
            self.seconds = time.monotonic() - began
        except (Exception, CheckpointException) as error:
            self.reason = reason_of(error)

    def _report_progress(self) -> None:
        self._pieces += 1
