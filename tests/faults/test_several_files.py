"""A rank's part of a checkpoint in several files, written and read side by side."""

from __future__ import annotations

import builtins
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_checkpoint import load, save
from torch.distributed.checkpoint import FileSystemReader

from m1_stages.checkpoint import CheckpointStore, files, snapshot
from m1_stages.checkpoint.files import in_threads
from m1_stages.config import ParallelConfig
from m1_stages.errors import CheckpointError
from m1_stages.runtime import device, parallel

THREADS = 3


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    monkeypatch.setattr(snapshot, "FILE_BYTES", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    return CheckpointStore(tmp_path / "checkpoints")


def test_files_are_as_many_as_threads_and_hold_the_state(store: CheckpointStore) -> None:
    saved = save(store, 1)
    assert sorted(path.name for path in saved.glob("*.distcp")) == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    assert load(CheckpointStore(store.root)) == 1


def test_files_are_read_side_by_side(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    running: set[int] = set()
    most, read_data = 0, FileSystemReader.read_data

    def slow(*args: Any) -> Any:
        nonlocal most
        running.add(threading.get_ident())
        most = max(most, len(running))
        time.sleep(0.3)
        running.remove(threading.get_ident())
        return read_data(*args)

    monkeypatch.setattr(FileSystemReader, "read_data", slow)
    assert load(CheckpointStore(store.root)) == 1
    assert most == THREADS
    assert FileSystemReader.read_data is slow, "the reader is torch's own again"


def test_one_file_that_cannot_be_written_fails_the_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: Any) -> Any:
        if path.name == "__0_1.distcp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return builtins.open(path, *args)

    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", full, raising=False)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(store, 2)
    assert [path.name for path in store.root.glob("step_*")] == ["step_00000001"]


@pytest.mark.parametrize("number", range(THREADS))
def test_each_file_is_verified(store: CheckpointStore, number: int) -> None:
    save(store, 1)
    path = save(store, 2) / f"__0_{number}.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert load(CheckpointStore(store.root)) == 1


def test_actions_run_side_by_side_and_the_first_failure_is_raised_when_all_have_ended() -> None:
    together, ended, looks = threading.Barrier(2, timeout=20), [], []

    def action(number: int) -> int:
        together.wait()
        if number == 2:
            time.sleep(0.3)
        ended.append(number)
        if number in (1, 2):
            raise OSError(f"action {number}")
        return 10 * number

    assert in_threads([lambda: action(3), lambda: action(4)], 2) == [30, 40]
    ended.clear()
    with pytest.raises(OSError, match="action 1"):
        in_threads(
            [lambda: action(0), lambda: action(2), lambda: action(1), lambda: action(5)][::-1],
            2,
            lambda: looks.append(1),
        )
    assert sorted(ended) == [0, 1, 2, 5]
    assert len(looks) >= 2


def test_no_more_threads_than_asked_for() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def action() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    in_threads([action] * 8, 3)
    assert most == 3
