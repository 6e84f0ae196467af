"""Notices a rank without progress, says which one is to blame, and ends this process instead of waiting for ever.

Every rank keeps ``RUN_DIR/ranks/rank-N.json`` (where it is, its last progress, when its watching thread last ran), so the
others can tell a dead process from a stopped one and from one that waits like themselves. Stacks go to
``RUN_DIR/stacks/rank-N.txt``: at the deadline, on a crash in native code, and on SIGUSR2, which then ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from m1_stages.errors import EXIT_LOST, RankLost
from m1_stages.run_dir import RANKS, STACKS
from m1_stages.runtime.phase_clock import PhaseClock, process_age

SLOW_PHASE_FACTOR = 3.0
"""Joining, building, loading and saving may take this many deadlines: they are long at scale and have no heartbeats inside."""

_PHASES = {
    "join": SLOW_PHASE_FACTOR,
    "build": SLOW_PHASE_FACTOR,
    "load": SLOW_PHASE_FACTOR,
    "data": 1.0,
    "train": 1.0,
    "save": SLOW_PHASE_FACTOR,
    "evaluate": 1.0,
}
"""The phases in the order of a step, with the number of deadlines that each may take."""
_current: Watchdog | None = None


def heartbeat(phase: str, step: int = 0) -> None:
    """Say that this rank makes progress, and where it is; nothing happens without a watchdog.

    Args:
        phase: "join" (the process group), "build" (the model), "load" (a checkpoint), "data", "train" (a micro-batch),
            "save" or "evaluate" (a micro-batch).
        step: optimizer steps done in the whole run.
    """
    if _current is not None:
        _current.heartbeat(phase, step)


def report_progress() -> None:
    """Say that this rank makes progress in the phase and step that it is in."""
    if _current is not None:
        _current.report_progress()


def wall_seconds() -> dict[str, float]:
    """Return the seconds of each phase of this process, "start" (before the first heartbeat) too; none without a watchdog."""
    return _current.clock.seconds() if _current is not None else {}


def dump_stacks(reason: str) -> str:
    """Write this rank's stacks beside those of the other ranks; returns the file, or an empty text without a watchdog."""
    return _current.dump(reason) if _current is not None else ""


class Watchdog:
    """Context manager around a rank's work; the watch begins with the first heartbeat.

    Args:
        deadline_s: seconds without a heartbeat after which the process reports, writes its stacks and leaves with ``EXIT_LOST``.
        on_expired: called with the reason, only on the first rank that still answers; a blocked terminal does not delay the exit.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world: int, deadline_s: float, on_expired: Callable[[RankLost], None]
    ) -> None:
        self._run_dir, self._rank, self._world = run_dir, rank, world
        self._deadline_s, self._on_expired = deadline_s, on_expired
        self._host, self._phase, self._step, self._progress_at = socket.gethostname(), "join", 0, time.monotonic()
        self.clock = PhaseClock(process_age())
        self._done, self._expired = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._stacks: IO[bytes] | None = None

    def __enter__(self) -> Watchdog:
        global _current
        _current = self
        return self

    def __exit__(self, *exception: object) -> None:
        global _current
        _current = None
        if self._thread is None or self._stacks is None:
            return
        self._done.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.disable()
        self._stacks.close()
        with suppress(OSError):
            self._record_path(self._rank).unlink()
            if not self._stack_path().stat().st_size:
                self._stack_path().unlink()
        for name in (RANKS, STACKS):
            with suppress(OSError):
                (self._run_dir / name).rmdir()

    def heartbeat(self, phase: str, step: int) -> None:
        """See :func:`heartbeat`."""
        self._phase, self._step, self._progress_at = phase, step, time.monotonic()
        self.clock.enter(phase)
        if self._thread is None:
            for name in (RANKS, STACKS):
                (self._run_dir / name).mkdir(parents=True, exist_ok=True)
            self._stacks = self._stack_path().open("ab", buffering=0)
            faulthandler.enable(self._stacks)
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True, chain=True)
            self._write_record()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def report_progress(self) -> None:
        """See :func:`report_progress`."""
        self._progress_at = time.monotonic()

    def dump(self, reason: str) -> str:
        """See :func:`dump_stacks`."""
        if self._stacks is None:
            return ""
        title = f"rank {self._rank}, process {os.getpid()} on {self._host}, step {self._step} ({self._phase}), {reason}"
        with suppress(OSError):  # a full disk must not keep the process from leaving
            self._stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode())
            faulthandler.dump_traceback(self._stacks)
        return str(self._stack_path())

    def verdict(self, what: str) -> RankLost:
        """Find the rank to blame from what all ranks last wrote; wait for ever when this process is being ended already."""
        while self._expired.is_set() and threading.current_thread() is not self._thread:
            time.sleep(1.0)
        silent = self._silent()
        return RankLost(
            f"{what}: {'; '.join(silent.values()) or self._behind()}",
            where=f"stacks of the ranks: {self._run_dir / STACKS}",
            fix="run the same command again: it continues from the last checkpoint; "
            "if nothing is broken and a step takes this long, raise parallel.timeout_s",
        )

    def _watch(self) -> None:
        interval = min(5.0, self._deadline_s / 10)
        woke = time.monotonic()
        while not self._done.wait(interval):
            now = time.monotonic()
            if now - woke > interval + self._deadline_s / 4:
                self._progress_at = now  # this process, or all of them, was stopped for a while: nobody's fault
            woke = now
            self._write_record()
            if now - self._progress_at > self._deadline_s * _PHASES[self._phase]:
                self._expire(now - self._progress_at, interval)

    def _expire(self, waited: float, interval: float) -> None:
        self._expired.set()
        self.dump(f"{waited:.0f} s without progress")
        error = self.verdict(f"no progress for {waited:.0f} s in step {self._step} ({self._phase})")
        first_awake = min(set(range(self._world)) - self._silent().keys(), default=self._rank)
        if self._rank == first_awake:
            reporter = threading.Thread(target=self._on_expired, args=(error,), daemon=True)
            reporter.start()
            reporter.join(5.0)
        time.sleep(2 * interval)  # the other ranks reach their own deadline and write their stacks
        os._exit(EXIT_LOST)

    def _silent(self) -> dict[int, str]:
        """Other ranks whose process is gone, stopped, or does not write any more."""
        found = {}
        for rank in set(range(self._world)) - {self._rank}:
            record = self._read_record(rank)
            if record is None:
                found[rank] = f"rank {rank} has not reported at all"
                continue
            name = f"rank {rank} (process {record['pid']} on {record['host']}, step {record['step']})"
            state = _process_state(record["pid"]) if record["host"] == self._host else ""
            age = time.time() - record["alive"]
            if state:
                found[rank] = f"{name} is {state}"
            elif age > self._deadline_s / 2:
                found[rank] = f"{name} has not answered for {age:.0f} s"
        return found

    def _behind(self) -> str:
        """Name the ranks that are not as far as the others, when all of them answer."""
        records = {rank: record for rank in range(self._world) if (record := self._read_record(rank))}
        places = {rank: (r["step"], list(_PHASES).index(r["phase"])) for rank, r in records.items()}
        behind = [rank for rank, place in places.items() if place < max(places.values())]
        names = ", ".join(f"rank {rank} in step {records[rank]['step']} ({records[rank]['phase']})" for rank in behind)
        if behind:
            return f"behind the others: {names}"
        return (
            "its stack says where"
            if self._world == 1
            else "all ranks answer and none is behind; their stacks say where"
        )

    def _write_record(self) -> None:
        record = {"rank": self._rank, "pid": os.getpid(), "host": self._host, "phase": self._phase, "step": self._step,
                  "progress": time.time() - (time.monotonic() - self._progress_at), "alive": time.time()}  # fmt: skip
        path = self._record_path(self._rank)
        with suppress(OSError):  # a full disk must not end a run that still moves
            path.with_suffix(".tmp").write_text(json.dumps(record))
            path.with_suffix(".tmp").replace(path)

    def _read_record(self, rank: int) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            record: dict[str, Any] = json.loads(self._record_path(rank).read_text())
            return record
        return None

    def _record_path(self, rank: int) -> Path:
        return self._run_dir / RANKS / f"rank-{rank}.json"

    def _stack_path(self) -> Path:
        return self._run_dir / STACKS / f"rank-{self._rank}.txt"


def _process_state(pid: int) -> str:
    """ "gone" or "stopped"; empty for a process of this machine that runs."""
    import psutil

    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "gone"
    return {psutil.STATUS_ZOMBIE: "gone", psutil.STATUS_DEAD: "gone", psutil.STATUS_STOPPED: "stopped"}.get(status, "")
