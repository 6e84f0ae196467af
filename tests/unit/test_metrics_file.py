"""A full disk delays the lines of ``metrics.jsonl``; none is lost, torn or out of order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1_stages import metrics_file
from m1_stages.errors import CheckpointError
from m1_stages.events import RunStopped, SaveFailed, read_events
from m1_stages.metrics_file import JsonLines


class Disk:
    """Stands for the disk below ``os.write``: it takes ``room`` more bytes, then it is full."""

    def __init__(self) -> None:
        self.room, self._write = 1 << 40, os.write

    def write(self, file: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(file, bytes(data[: self.room]))
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(metrics_file.os, "write", disk.write)
    return disk


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_events(path)]


def test_lines_wait_for_room_and_are_written_in_order(tmp_path: Path, disk: Disk) -> None:
    path, delays = tmp_path / "metrics.jsonl", []
    lines = JsonLines(path, delays.append)
    lines(SaveFailed(step=0, reason="a"))
    whole = path.read_bytes()
    disk.room = 10
    for step in (1, 2, 3):
        lines(SaveFailed(step=step, reason="a"))
    assert delays == ["No space left on device"], "said once"
    assert path.read_bytes()[: len(whole)] == whole
    assert len(path.read_bytes()) == len(whole) + 10
    assert steps(path) == [0], "the torn last line does not disturb a reader"
    disk.room = 1 << 40
    lines(SaveFailed(step=4, reason="a"))
    assert steps(path) == [0, 1, 2, 3, 4]
    disk.room = 0
    lines(SaveFailed(step=5, reason="a"))
    assert len(delays) == 2, "a second outage is said again"
    disk.room = 1 << 40
    lines.close()
    assert steps(path) == [0, 1, 2, 3, 4, 5]


@given(rooms=st.lists(st.integers(0, 400), min_size=1, max_size=12))
def test_whatever_the_disk_takes_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory, rooms: list[int]) -> None:
    path, disk = tmp_path_factory.mktemp("events") / "metrics.jsonl", Disk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file.os, "write", disk.write)
        lines = JsonLines(path)
        for step, disk.room in enumerate(rooms):
            lines(SaveFailed(step=step, reason="x" * step))
        disk.room = 1 << 40
        lines.close()
    assert steps(path) == list(range(len(rooms)))


def test_events_that_can_not_be_written_at_the_end_are_an_error(tmp_path: Path, disk: Disk) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    disk.room = 3
    lines(RunStopped(reason="done", exit_code=0, wall_s={"train": 1.0}))
    with pytest.raises(CheckpointError, match="No space left") as caught:
        lines.close(patience_s=0.0)
    assert caught.value.where == str(tmp_path / "metrics.jsonl")
    assert caught.value.exit_code == 5
    lines.close()  # nothing happens twice


def test_memory_is_bounded(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "MOST_WAITING_BYTES", 500)
    lines, disk.room = JsonLines(tmp_path / "metrics.jsonl"), 0
    lines(SaveFailed(step=0, reason="x" * 300))
    with pytest.raises(CheckpointError, match="cannot be written"):
        lines(SaveFailed(step=1, reason="x" * 300))


def test_names_that_are_not_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines(SaveFailed(step=np.int64(3), reason=os.fsdecode(b"/tmp/nonutf\xff8")))  # type: ignore[arg-type]
    lines.close()
    (record,) = read_events(tmp_path / "metrics.jsonl")
    assert (record["step"], record["reason"]) == (3, "/tmp/nonutf\\udcff8")
