"""Kills a five-stage run at random moments and starts it again, until it was killed often enough; imports are paid once."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.guard_run_worker import spoil

from m1_stages.config.load import load_config
from m1_stages.curriculum import stages_of
from m1_stages.runtime import device

device.use("cpu")

from megatron.core import dist_checkpointing  # noqa: E402, F401 - all imports before the first fork

import m1_stages.model  # noqa: E402, F401
from m1_stages.events import Event  # noqa: E402
from m1_stages.jobs import pretrain  # noqa: E402

MOMENTS = ("RolledBack", "GuardNoticed skip", "StepExcluded", "GuardNoticed roll_back")


def dying_at(moment: str) -> Callable[[Event], None]:
    def sink(event: Event) -> None:
        if f"{type(event).__name__} {getattr(event, 'action', '')}".strip() == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return sink


def start(config: Path, run_dir: Path, *, background: bool, moment: str = "") -> int:
    """A child that trains all stages."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        settings = [f"run.dir={run_dir}", f"run.async_save={'on' if background else 'off'}"]
        pretrain.run(load_config(config, settings), stages_of("all"), [dying_at(moment)] if moment else [])
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int:
    """Exit code of a child that gets so much time: 0 when it was faster."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def kill_and_continue(job: dict[str, Any]) -> list[int]:
    """How often each run was killed, until there were ``kills``; fails when a start fails.

    In ``folder``/uninterrupted nothing happens to the run; in ``folder``/<n> it is killed until it gets to its end, with
    checkpoints written in the background for even n.

    Args:
        job: ``config``, ``folder``, ``kills``, ``seed``, and ``bad``: samples that are bad in every run (``spoil``). With
            any, the first start of every run <n> ends by its own SIGKILL when something of the guard is reported, another
            thing each time (``MOMENTS``), the others at random moments.
    """
    config, folder, kills, bad = Path(job["config"]), Path(job["folder"]), job["kills"], job["bad"]
    spoil(bad)
    rng = random.Random(job["seed"])
    began = time.monotonic()
    assert wait(start(config, folder / "uninterrupted", background=False)) == 0
    whole_s = time.monotonic() - began
    killed: list[int] = []
    while kills > 0:
        run, times, code = len(killed), 0, -signal.SIGKILL
        while code:
            moment = MOMENTS[run % len(MOMENTS)] if bad and not times else ""
            child = start(config, folder / str(run), background=run % 2 == 0, moment=moment)
            at_random = kills > 0 and not moment
            code = kill_after(child, rng.uniform(0.0, 0.8 * whole_s)) if at_random else wait(child)
            assert code or not moment, f"{moment} was never reported"
            assert code in (0, -signal.SIGKILL), f"start {times} of run {run} ended with {code}"
            if code:
                kills, times = kills - 1, times + 1
        killed.append(times)
    return killed
