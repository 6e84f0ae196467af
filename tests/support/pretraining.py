"""``m1 pretrain``'s job as a job of ``support.ranks``: how every test runs it in a process that is not its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from m1_stages.checkpoint import files, store
from m1_stages.config.load import load_config
from m1_stages.curriculum import stages_of
from m1_stages.errors import M1Error
from m1_stages.events import Event, Sink, StageStarted, StepDone
from m1_stages.jobs import pretrain, sft


def pretrained(job: dict[str, Any], sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Train stages and say how it ended, as the command would: ``exit`` (its code), ``error``; ``loaded`` counts checkpoints.

    Args:
        job: ``config``, a path, and ``stages``, a name, "all", a list of names, or ["sft"]; if need be ``set``, ``force``,
            ``events``, a file to which every event is appended as a line of JSON, and ``stop_at``, a global step:
            this process sends itself a SIGTERM when it is reported; ``slow_finals``: the final checkpoint of a stage is
            written when the next one has trained a step (``run.async_save``), that of ``slow_finals`` ends as ever.
        sinks: who else gets the events.
    """
    stages = job["stages"] if isinstance(job["stages"], list) else stages_of(job["stages"])
    with ExitStack() as stack:
        load = stack.enter_context(patch.object(store, "load_verified", wraps=store.load_verified))
        file = stack.enter_context(open(job["events"], "a")) if "events" in job else None
        written = threading.Event()
        written.set()
        if "slow_finals" in job:
            stack.enter_context(patch.object(files, "open", _opens_after(written), create=True))

        ends: dict[str, int] = {}

        def sink(event: Event) -> None:
            if file:
                file.write(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}) + "\n")
                file.flush()
            if isinstance(event, StageStarted):
                ends[event.stage] = event.num_steps - 1
            if isinstance(event, StepDone) and "slow_finals" in job:
                last = event.step == ends[event.stage] and event.stage != job["slow_finals"]
                written.clear() if last else written.set()
            if isinstance(event, StepDone) and event.global_step == job.get("stop_at", -1):
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            resolved = load_config(Path(job["config"]), job.get("set", []))
            if stages == ["sft"]:
                sft.run(resolved, [*sinks, sink])
            else:
                pretrain.run(resolved, stages, [*sinks, sink], force=job.get("force", False))
        except M1Error as error:
            return {"exit": error.exit_code, "error": str(error), "loaded": load.call_count}
    return {"exit": 0, "error": "", "loaded": load.call_count}


def _opens_after(event: threading.Event) -> Callable[..., Any]:
    def opened(*args: Any) -> Any:
        assert event.wait(60)
        return open(*args)

    return opened


def events_of(path: Path, *names: str) -> list[dict[str, Any]]:
    """The events of these names, or all, in a file of one JSON object a line."""
    events = map(json.loads, path.read_text().splitlines())
    return [event for event in events if not names or event["event"] in names]
