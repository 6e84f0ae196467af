"""Starts the processes of a run on this machine, prints how, and hands their exit code on."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from rich.markup import escape

from m1_data.errors import EnvironmentProblem
from m1_stages.config import Resolved
from m1cli.console import console

_GRACE_S = 60.0


def is_worker() -> bool:
    """Whether torchrun, srun or this launcher started the process as one rank of several."""
    return "RANK" in os.environ or _in_slurm_step()


def _in_slurm_step() -> bool:
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def num_processes(resolved: Resolved) -> int:
    """``parallel.processes``, or one per visible GPU, or 1."""
    configured = resolved.config.parallel.processes
    if configured or resolved.config.run.device == "cpu":
        return configured or 1
    import torch

    return max(1, torch.cuda.device_count())


def adopt_slurm() -> None:
    """Give a rank that srun started the names torch reads.

    Raises:
        EnvironmentProblem: several machines, and nobody said where rank 0 is.
    """
    if "RANK" in os.environ or not _in_slurm_step():
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1:
            raise EnvironmentProblem(
                "srun started ranks on several machines, and MASTER_ADDR does not say where rank 0 is",
                fix="in the batch script: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)",
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29500")


def run_ranks(arguments: list[str], world: int) -> int:
    """Run ``python -m m1cli ARGUMENTS`` as ``world`` ranks; the first failure ends the others.

    Returns:
        The exit code of the first rank that failed, or 0. Signals are passed on to every rank.
    """
    command = [sys.executable, "-m", "m1cli", *arguments]
    port = _free_port()
    console.print(f"[dim]starting {world} processes:[/] {escape(shlex.join(command))}", soft_wrap=True)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
                   "LOCAL_WORLD_SIZE": str(world), "PYTHONSAFEPATH": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]], now: Callable[[], float] = time.monotonic) -> int:
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in ranks):
        if not failed:
            failed = next((p.returncode for p in ranks if p.returncode), 0)
            if failed:
                deadline = now() + _GRACE_S
        if now() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.1)
    failed = failed or next((p.returncode for p in ranks if p.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
