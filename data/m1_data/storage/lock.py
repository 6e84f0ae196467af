"""One command at a time writes to a folder; commands that only read it keep a writer from replacing it meanwhile.

A lock is a small file that names its holder. It works on every file system that can create a file if there is none, also one
that several machines share: there the holder's sign of life is the file's time, renewed every ``BEAT_S`` seconds.
A holder that is gone is recognised at once on its own machine, and after ``STALE_S`` seconds without a sign of life elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from m1_data.errors import ConfigError, InUse
from m1_data.storage.ownership import temporary_sibling
from m1_data.storage.process import ProcessId, is_running, this_process

BEAT_S = 10.0
STALE_S = 60.0
_GUARD_S = 5.0
"""Seconds to wait for another start on this machine that is looking at the same lock."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What a lock says about the command that holds it."""

    process: str
    """Its ``ProcessId`` as text."""
    host: str
    command: str
    since: float
    """Unix seconds."""
    token: str
    """Tells this lock from every other one."""

    def to_bytes(self) -> bytes:
        """Return the content of the lock's file."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def parse(content: bytes) -> Holder | None:
        """Return the holder that a lock's file names, or None when it is not of ours."""
        try:
            holder = Holder(**json.loads(content))
            return holder if ProcessId.parse(holder.process) and holder.since > 0 else None
        except (ValueError, TypeError, AttributeError):
            return None


class Lock:
    """A lock that this process holds, until ``release``.

    Args:
        path: the lock's file; there is none.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        command = shlex.join(["m1", *sys.argv[1:]])
        holder = Holder(str(this_process()), socket.gethostname(), command, time.time(), uuid.uuid4().hex)
        self._content, self._pid, self._lost = holder.to_bytes(), os.getpid(), False
        with path.open("xb", buffering=0) as file:
            try:
                file.write(self._content)
                os.fsync(file.fileno())
            except OSError:
                path.unlink(missing_ok=True)
                raise
        self._beaten_at, self._done = time.time(), threading.Event()
        threading.Thread(target=self._beat_on, name="lock", daemon=True).start()

    def require_held(self) -> None:
        """Do nothing while the lock is held; a holder that gave no sign of life for long may have lost it.

        Raises:
            InUse: another command has taken it; this one must not write any more.
        """
        if time.time() - self._beaten_at > 2 * BEAT_S:
            self._beat()
        if self._lost:
            raise InUse(
                "this command was suspended for so long that it lost its lock to another one, and stops",
                where=str(self.path),
                fix="look which command works there, or run the same command again",
            )

    def release(self) -> None:
        """Give the lock back; nothing happens in a forked process, or when it was lost."""
        self._done.set()
        if os.getpid() == self._pid and self._is_ours():
            with suppress(OSError):
                self.path.unlink()

    def _beat_on(self) -> None:
        while not self._done.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        if self._is_ours():
            with suppress(OSError):
                os.utime(self.path)
                self._beaten_at = time.time()

    def _is_ours(self) -> bool:
        try:
            self._lost = self._lost or self.path.read_bytes() != self._content
        except FileNotFoundError:
            self._lost = True
        except OSError:
            pass  # the file system does not answer now
        return not self._lost


@contextmanager
def writing(path: Path, what: str) -> Iterator[Lock]:
    """Hold the lock ``path`` as the one writer.

    Args:
        what: names what is written in a refusal, as in "the run directory run".

    Raises:
        InUse: a writer or a reader is at work there. Nothing was changed.
        ConfigError: ``path`` is a file of somebody else's.
        OSError: the lock cannot be written.
    """
    lock = _take(path, what)
    try:
        for mark in _marks(path):
            if not _removed_if_stale(mark):
                raise _in_use(mark, what)
        yield lock
    finally:
        lock.release()


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Keep writers away from what the lock ``path`` protects; other readers do not matter.

    Where nothing can be written (a read-only file system, say), the folder is read without a mark.

    Raises:
        InUse: a writer is at work there.
    """
    mark: Lock | None = None
    with suppress(OSError, ConfigError):
        for left in _marks(path):
            _removed_if_stale(left)  # of a reader that was killed
    with suppress(OSError):
        mark = Lock(path.with_name(f"{path.name}.reader-{this_process()}-{uuid.uuid4().hex[:8]}"))
    try:
        refuse_while_written(path, what)
        yield
    finally:
        if mark is not None:
            mark.release()


def lock_of(folder: Path) -> Path:
    """Return the lock of a folder that is replaced as a whole: it lies beside the folder, wherever links lead."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.lock")


def refuse_while_written(path: Path, what: str) -> None:
    """Look at the lock ``path`` without taking it.

    Raises:
        InUse: a writer holds it.
    """
    content = _content(path)
    if content is not None and not _is_stale(path, content):
        raise _in_use(path, what)


def _take(path: Path, what: str) -> Lock:
    with _one_start_at_a_time(path.parent):
        for _ in range(3):
            with suppress(FileExistsError):
                return Lock(path)
            if not _removed_if_stale(path):
                break
    raise _in_use(path, what)


@contextmanager
def _one_start_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two starts on this machine from taking over one stale lock; ``_removed_if_stale`` minds those of others."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _GUARD_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def _marks(path: Path) -> list[Path]:
    prefix = f"{path.name}.reader-"
    return sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(prefix))


def _content(path: Path) -> bytes | None:
    """What is in the file of a lock; None without one. A file that was just created gets a moment to be written."""
    for _ in range(10):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if content:
            break
        time.sleep(0.02)
    return content


def _is_stale(path: Path, content: bytes) -> bool:
    """Whether the holder is gone.

    Raises:
        ConfigError: the file is not a lock of ours.
    """
    holder = Holder.parse(content)
    if holder is None and content:
        raise ConfigError(
            "a file of the name that m1 gives its lock was not written by m1, and is not replaced",
            where=str(path),
            fix="move it elsewhere",
        )
    process = ProcessId.parse(holder.process) if holder else None
    running = is_running(process) if process else None
    return _silent_s(path) > STALE_S if running is None else not running


def _silent_s(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system: those of two machines may differ."""
    probe = temporary_sibling(path)
    try:
        with probe.open("xb") as file:
            now = os.fstat(file.fileno()).st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    try:
        with path.open("rb") as file:  # opening asks the server for the present time of a file
            return now - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _removed_if_stale(path: Path) -> bool:
    """Remove a lock whose holder is gone; return whether it is not there any more."""
    content = _content(path)
    if content is None:
        return True
    if not _is_stale(path, content):
        return False
    aside = temporary_sibling(path)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    if aside.read_bytes() != content:  # another machine was faster: what was moved is its new lock
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return True


def _in_use(path: Path, what: str) -> InUse:
    holder = Holder.parse(_content(path) or b"")
    if holder is None:
        return InUse(f"{what} is in use by another command", where=str(path), fix="run the same command again")
    process = ProcessId.parse(holder.process)
    away = process is not None and is_running(process) is None
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    return InUse(
        f"{what} is in use by another command: {holder.command}",
        where=f"process {process.pid if process else '?'} on {holder.host}, since {since} (lock {path})",
        fix="wait until it has ended, or end it"
        + (f"; if its machine is down, run this command again {STALE_S:.0f} s after that" if away else ""),
    )
