"""``m1`` commands one after the other in one process, and fine-tunings that are stopped."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from golden import import_run_worker

from m1_stages.config.load import load_config
from m1_stages.config.sft_runs import for_run
from m1_stages.errors import M1Error
from m1_stages.events import Event, StepDone
from m1_stages.jobs import sft


def commands(job: dict[str, Any]) -> list[list[Any]]:
    """Exit code and output of every entry of ``job["commands"]``: arguments of ``m1``, a ``stopped`` run, or a ``copy``."""
    out = []
    for command in job["commands"]:
        if isinstance(command, list):
            out += import_run_worker.commands({"commands": [command]})
        elif "copy" in command:
            source, target = map(Path, command["copy"])
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            out.append([0, ""])
        else:
            out.append(_stopped(**command))
    return out


def _stopped(config: str, name: str, steps: int) -> list[Any]:
    """Fine-tune the run ``name``, with a SIGTERM after its first ``steps``."""

    def sink(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        sft.run(for_run(load_config(Path(config)), name), [sink])
    except M1Error as error:
        return [error.exit_code, str(error)]
    return [0, ""]
