"""Tells whether the process that left a file behind is still there: by machine, number and start time, not by number alone."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process of one machine; two processes are never equal, even when the second one gets the number of the first."""

    machine: str
    """Names the running kernel and its set of process numbers: a restart or another container gives another one."""
    pid: int
    started: int
    """Start time in ticks of the machine's clock since it started; 0 where the system does not tell."""

    def __str__(self) -> str:
        return f"{self.machine}-{self.pid}-{self.started}"

    @staticmethod
    def parse(text: str) -> ProcessId | None:
        """Return the process that ``str`` was made of, or None when the text is not of that form."""
        parts = text.split("-")
        if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
            return None
        return ProcessId(parts[0], int(parts[1]), int(parts[2]))


def this_process() -> ProcessId:
    """Return the identity of the calling process."""
    return ProcessId(_machine(), os.getpid(), _started(os.getpid()) or 0)


def is_running(process: ProcessId) -> bool | None:
    """Return whether ``process`` runs; None when it belongs to another machine, so that nobody here can tell."""
    if process.machine != _machine():
        return None
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    started = _started(process.pid)
    return started is None or started == process.started


@cache
def _machine() -> str:
    try:
        name = (_PROC / "sys/kernel/random/boot_id").read_text() + os.readlink(_PROC / "self/ns/pid")
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _started(pid: int) -> int | None:
    """The start time of a process; -1 of one that has ended and waits for its parent; None when the system does not tell."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
