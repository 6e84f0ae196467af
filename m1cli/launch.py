"""Starts the processes of a run on this machine, prints how, watches them, and hands their exit code on."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from rich.markup import escape

from m1_stages.config import Resolved
from m1_stages.errors import EXIT_LOST, EXIT_PREEMPTED, EnvironmentProblem, RankLost
from m1_stages.run_dir import STACKS
from m1_stages.runtime.rendezvous import LISTENER, listen
from m1_stages.runtime.signals import STOP_SIGNALS
from m1cli.console import console
from m1cli.errors import show

LAUNCHER = "M1_LAUNCHER_PID"
"""Environment variable that names the process which started the rank."""
_PR_SET_PDEATHSIG = 1
_SAVE_S, _SPEAK_S, _DUMP_S = 60.0, 2.0, 2.0
"""Seconds the other ranks get: to finish saving, to say what is wrong with them, to write their stacks."""


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
    if per_node := re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):  # "8(x2)": equal on every machine
        os.environ["LOCAL_WORLD_SIZE"] = per_node[0]
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1:
            raise EnvironmentProblem(
                "srun started ranks on several machines, and MASTER_ADDR does not say where rank 0 is",
                fix="in the batch script: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)",
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29500")


def die_with_launcher() -> None:
    """In a rank of this launcher: be killed when the launcher is, so that nothing holds the GPUs or the run directory."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before it could be tied to
        os._exit(EXIT_LOST)


def run_ranks(arguments: list[str], world: int, run_dir: Path, asked: list[int] | None = None) -> int:
    """Run ``python -m m1cli ARGUMENTS`` as ``world`` ranks; the first failure ends the others.

    Args:
        asked: gets the signals that asked for a stop, also where all ranks had finished before they could.

    Returns:
        0; the exit code of the first rank that failed; ``EXIT_LOST`` when one was killed; 128 + the signal when a stop was
        asked for before any rank could save. Signals are passed on to every rank.
    """
    command = [sys.executable, "-m", "m1cli", *arguments]
    listener = listen()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": str(world),
              "LOCAL_WORLD_SIZE": str(world), "PYTHONSAFEPATH": "1"}  # fmt: skip
    if world > 1:
        _print_by_hand(command, shared, world)
    environment = {**os.environ, **shared, LAUNCHER: str(os.getpid()), LISTENER: str(listener.fileno())}
    ranks: list[subprocess.Popen[bytes]] = []
    asked = [] if asked is None else asked

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        for rank in range(world):
            # A session of its own: Ctrl-C reaches a rank once, through this launcher, and a rank's children end with it.
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                )
            )
        listener.close()  # rank 0 has it now: nobody waits for a rank 0 that is gone
        return _wait(ranks, asked, run_dir)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_by_hand(command: list[str], shared: dict[str, str], world: int) -> None:
    """One line for a shell that starts the same ranks, and one for torchrun."""
    settings = " ".join(f"{name}={value}" for name, value in shared.items())
    numbers = " ".join(map(str, range(world)))
    console.print(f"[dim]starting {world} processes; the same by hand:[/]")
    loop = f"for r in {numbers}; do {settings} RANK=$r LOCAL_RANK=$r {shlex.join(command)} & done; wait"
    beside = Path(command[0]).with_name("torchrun")
    torchrun = [str(beside)] if beside.exists() else [command[0], "-m", "torch.distributed.run"]
    for line in (loop, shlex.join([*torchrun, "--standalone", f"--nproc-per-node={world}", *command[1:]])):
        console.print(f"  [dim]{escape(line)}[/]", soft_wrap=True)


def _wait(ranks: list[subprocess.Popen[bytes]], asked: list[int], run_dir: Path) -> int:
    """Wait for all ranks; after a failure, for as long as the others may still have something to do or say."""
    first, deadline = None, float("inf")
    while any(process.poll() is None for process in ranks):
        if first is None and (first := _failure(ranks)) is not None:
            deadline = time.monotonic() + _grace(ranks, first)
        if time.monotonic() > deadline:
            _end(ranks)
        time.sleep(0.1)
    first = _failure(ranks) if first is None else first
    if first is None:
        return 0
    code = ranks[first].returncode
    if code >= 0:
        return code
    if -code in asked:
        return 128 - code
    name = signal.Signals(-code).name
    show(
        RankLost(
            f"rank {first} (process {ranks[first].pid}) was killed by {name}",
            where=f"stacks of the ranks: {run_dir / STACKS}",
            fix="run the same command again: it continues from the last checkpoint"
            + ("; if nobody killed it, look for 'out of memory' in: dmesg | tail" if -code == signal.SIGKILL else ""),
        )
    )
    return EXIT_LOST


def _failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed first, as far as can be seen: one that a signal killed is the cause, an error the effect."""
    failed = {rank: process.returncode for rank, process in enumerate(ranks) if process.poll()}
    return min(failed, key=lambda rank: (failed[rank] >= 0, rank), default=None)


def _grace(ranks: list[subprocess.Popen[bytes]], first: int) -> float:
    code = ranks[first].returncode
    if code == EXIT_PREEMPTED:
        return _SAVE_S
    return 0.0 if code < 0 or code == EXIT_LOST or first == 0 else _SPEAK_S


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs, stopped ranks too: first with the signal on which they write their stacks, then for good."""
    alive = [process for process in ranks if process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + _DUMP_S
    while time.monotonic() < deadline and any(process.poll() is None for process in alive):
        time.sleep(0.02)
    for process in [p for p in ranks if p in alive or p.returncode]:  # with what a failed rank left behind
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
