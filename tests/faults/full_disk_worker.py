"""Trains while another program fills the disk of the run to the last byte, for a while."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

from support.pretraining import pretrained

from m1_stages.events import Event, StepDone


def fill(path: Path) -> None:
    """Write until nothing fits any more."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as ``pretrained``; after step ``full_at`` of the run its disk is full for ``seconds``, from which it is freed."""
    filler = Path(job["filler"])

    def sink(event: Event) -> None:
        if isinstance(event, StepDone) and event.global_step == job["full_at"] and not filler.exists():
            fill(filler)
            threading.Thread(target=free).start()

    def free() -> None:
        time.sleep(job["seconds"])
        filler.write_bytes(b"")

    return pretrained(job, [sink])
