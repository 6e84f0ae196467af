"""A disk that is full for a while costs messages; one that stays full ends the run with its path and exit code 5."""

from __future__ import annotations

import builtins
import errno
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.saving import Job
from support.small_disk import small_disk
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

from m1_data.storage import durable
from m1_data.storage.durable import write_when_there_is_room
from m1_stages.checkpoint import files
from m1_stages.checkpoint import store as store_module
from m1_stages.config import ParallelConfig
from m1_stages.errors import CheckpointError
from m1_stages.runtime import device, parallel
from m1_stages.training import checkpointer as checkpointer_module


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


class Disk:
    """Stands for the disk that checkpoints are written to: it is full until a moment, or for some tries to write."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full_until = 0.0
        self.refusals = 0
        patch.setattr(files, "open", self._open, raising=False)
        patch.setattr(checkpointer_module, "_RETRY_S", 0.05)

    def _open(self, *args: Any) -> Any:
        self.refusals -= 1
        if self.refusals >= 0 or time.monotonic() < self.full_until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return builtins.open(*args)


def job(root: Path, patience_s: float) -> Job:
    job = Job(root, background=False)
    job.checkpointer._patience_s = patience_s
    return job


def test_a_final_checkpoint_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = Disk(monkeypatch), job(tmp_path / "checkpoints", 30.0)
    disk.refusals = 5  # more than max_failed, within the patience
    assert [path.name for path in run.save_final(1)] == ["step_00000001"]
    assert run.told() == [("failed", 1)] * 5 + [("saved", 1)]


def test_fast_steps_do_not_use_up_the_patience_and_a_disk_that_stays_full_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = Disk(monkeypatch), job(tmp_path / "checkpoints", 1.0)
    run.save(1)
    disk.full_until = time.monotonic() + 60
    run.save(2, 3, 4, 5, 6)
    assert run.told()[1:] == [("failed", step) for step in range(2, 7)]
    time.sleep(1.0)
    with pytest.raises(CheckpointError, match="6 consecutive checkpoints could not be written") as caught:
        run.save(7)
    assert str(tmp_path / "checkpoints" / "step_00000007") in caught.value.where
    assert caught.value.exit_code == 5
    with pytest.raises(CheckpointError, match="consecutive"):
        run.save_final(8)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"], (
        "nothing is left behind"
    )


def test_a_checkpoint_is_there_although_latest_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = job(tmp_path / "checkpoints", 0.0), store_module.write_atomically

    def full(path: Path, data: bytes | str) -> None:
        if path.name == "LATEST":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(store_module, "write_atomically", full)
    run.save(1, 2)
    assert run.told() == [("saved", 1), ("saved", 2)]


def test_a_small_file_waits_for_room_and_no_other_error_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, number = [], errno.ENOSPC

    def write(path: Path, data: bytes | str) -> None:
        tries.append(path)
        if len(tries) < 3:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable, "write_atomically", write)
    monkeypatch.setattr(durable, "_RETRY_S", 0.01)
    write_when_there_is_room(tmp_path / "a", "x", patience_s=30)
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(OSError, match="No space left"):
        write_when_there_is_room(tmp_path / "a", "x", patience_s=0.0)
    tries.clear()
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        write_when_there_is_room(tmp_path / "a", "x", patience_s=30)
    assert len(tries) == 1


def _train(folder: Path, run_dir: Path, *, full_at: int, seconds: float = 0.0) -> Path:
    """Train a stage of 8 steps with a save every 2; returns the final checkpoint."""
    settings = [f"run.dir={run_dir}", "run.save_every_steps=2", "stages.32k.tokens=8192"]
    values = {
        "config": str(folder / "m1.toml"),
        "stages": "32k",
        "set": settings,
        "full_at": full_at,
        "seconds": seconds,
    }
    (ended,) = run_on_ranks(1, "faults.full_disk_worker:train", values | {"filler": str(run_dir.parent / "filler")})
    assert (ended["exit"], ended["error"]) == (0, "")
    done = [event["global_step"] for event in events_of(run_dir / "metrics.jsonl", "StepDone")]
    assert done == list(range(8)), "every line is there, once and in order"
    return run_dir / "checkpoints" / "step_00000008"


def _compare(folder: Path, *, moments: list[int], seconds: float) -> None:
    make_run(folder)
    uncut = tensors_of(_train(folder, folder / "uncut", full_at=-1))
    for number, moment in enumerate(moments):
        with small_disk(folder / f"disk-{number}") as mounted:
            final = _train(folder, mounted / "run", full_at=moment, seconds=seconds)
            told = {event["event"] for event in events_of(mounted / "run" / "metrics.jsonl")}
            assert "EventsDelayed" in told, "the disk was full"
            cut = tensors_of(final)
            assert cut.keys() == uncut.keys()
            assert [name for name in cut if not torch.equal(cut[name], uncut[name])] == []


def test_a_run_on_a_full_disk_ends_as_if_it_never_was(tmp_path: Path) -> None:
    _compare(tmp_path, moments=[3], seconds=2.0)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_disk_is_full_for_ten_seconds_at_ten_moments(tmp_path: Path) -> None:
    _compare(tmp_path, moments=[random.Random(5).randrange(8) for _ in range(10)], seconds=10.0)
