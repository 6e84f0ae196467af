"""Writes ``metrics.jsonl``. A full disk delays its lines, and neither ends the run nor loses one."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from m1_stages.errors import CheckpointError
from m1_stages.events import Event, Record

MOST_WAITING_BYTES = 64 << 20
"""Events that wait in memory for a full disk, at most."""
_LAST_TRY_S = 30.0
"""Seconds that a run which is about to leave waits for a full disk to take its last events."""


class JsonLines:
    """Sink that appends to ``metrics.jsonl``; every line is written at once, so a killed run keeps what it reported.

    While the disk is full or failing, lines wait in memory: none is lost, torn, or out of order when it takes them again.

    Args:
        on_delay: called with the reason when the first line has to wait; not again before all have been written.
    """

    def __init__(self, path: Path, on_delay: Callable[[str], None] = lambda reason: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._path, self._on_delay, self._waiting = path, on_delay, bytearray()
        self._delayed = False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __call__(self, event: Event) -> None:
        """Append ``event``.

        Raises:
            CheckpointError: more than ``MOST_WAITING_BYTES`` wait.
        """
        record = {"event": type(event).__name__, "time": time.time(), **dataclasses.asdict(event)}
        self._waiting += _line(record)
        if (reason := self._write()) and not self._delayed:
            self._delayed = True
            self._on_delay(reason)
        if len(self._waiting) > MOST_WAITING_BYTES:
            raise self._lost(reason)

    def close(self, *, patience_s: float = _LAST_TRY_S) -> None:
        """Write what waits, for up to ``patience_s`` seconds, and close the file.

        Raises:
            CheckpointError: the last events could not be written.
        """
        if self._file < 0:
            return
        deadline = time.monotonic() + patience_s
        while (reason := self._write()) and time.monotonic() < deadline:
            time.sleep(0.2)
        os.close(self._file)
        self._file = -1
        if self._waiting:
            raise self._lost(reason)

    def _write(self) -> str:
        """Write what waits, and return why that was not possible; what was written of a line is not written again."""
        try:
            while self._waiting:
                del self._waiting[: os.write(self._file, self._waiting)]
        except OSError as error:
            return error.strerror or str(error)
        self._delayed = False
        return ""

    def _lost(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the events of the run cannot be written: {reason}",
            where=str(self._path),
            fix="free some space and run the same command again: it continues from the last checkpoint",
        )


def _line(record: Record) -> bytes:
    try:
        return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
    except TypeError:  # a path that is not UTF-8
        return orjson.dumps(_as_utf8(record), option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"


def _as_utf8(value: Any) -> Any:
    """The same values; characters that UTF-8 does not have are written as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_utf8(key): _as_utf8(item) for key, item in value.items()}
    return [_as_utf8(item) for item in value] if isinstance(value, (list, tuple)) else value


def _cut_torn_line(path: Path) -> None:
    """Drop what a killed run left of its last line, so that the next event starts a line of its own."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
