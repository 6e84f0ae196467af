"""Trains while another program fills the disk of the run to the last byte, for a while."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from support.pretraining import pretrained
from support.small_disk import fill

from m1_stages.events import Event, StepDone


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
