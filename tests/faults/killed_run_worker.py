"""Kills a five-stage run at random moments and starts it again, until it was killed often enough; imports are paid once.

Usage: python killed_run_worker.py CONFIG FOLDER KILLS SEED
In FOLDER/uninterrupted nothing happens to the run; in FOLDER/<n> it is killed until it gets to its end, with checkpoints
written in the background for even n. Prints ``killed <times>`` for each n, and fails when a start fails.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from m1_stages.configload import load_config
from m1_stages.curriculum import stages_of
from m1_stages.engine import device

device.use("cpu")

from megatron.core import dist_checkpointing  # noqa: E402, F401 - all imports before the first fork

import m1_stages.model  # noqa: E402, F401
from m1_stages.engine import pretrain  # noqa: E402


def start(config: Path, run_dir: Path, *, background: bool) -> int:
    """A child that trains all stages."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        settings = [f"run.dir={run_dir}", f"run.async_save={'on' if background else 'off'}"]
        pretrain.run(load_config(config, settings), stages_of("all"), [])
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


def main(config: Path, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    began = time.monotonic()
    assert wait(start(config, folder / "uninterrupted", background=False)) == 0
    whole_s = time.monotonic() - began
    run = 0
    while kills > 0:
        times, code = 0, -signal.SIGKILL
        while code:
            child = start(config, folder / str(run), background=run % 2 == 0)
            code = kill_after(child, rng.uniform(0.0, 0.8 * whole_s)) if kills > 0 else wait(child)
            assert code in (0, -signal.SIGKILL), f"start {times} of run {run} ended with {code}"
            if code:
                kills, times = kills - 1, times + 1
        print(f"killed {times}", flush=True)
        run += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
