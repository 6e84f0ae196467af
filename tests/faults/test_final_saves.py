"""The final checkpoint of a stage, written while the next stage trains: it is committed, or the run says that it cannot be."""

from __future__ import annotations

import builtins
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saving import Job
from support.tiny_checkpoint import load, state

from m1_stages.checkpoint import CheckpointStore, files
from m1_stages.config import ParallelConfig
from m1_stages.errors import CheckpointError
from m1_stages.runtime import device, parallel
from m1_stages.training import checkpointer
from m1_stages.training.train_state import TrainState


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


class Disk:
    """A file system that waits until it is let go, and is full for as many files as it is told."""

    def __init__(self) -> None:
        self.go, self.refusals = threading.Event(), 0

    def open(self, path: Any, mode: str) -> Any:
        assert self.go.wait(60)
        if self.refusals and str(path).endswith(".distcp"):
            self.refusals -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return builtins.open(path, mode)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(files, "open", disk.open, raising=False)
    yield disk
    disk.go.set()


class Training(Job):
    """A run whose weights change after every save begins, as the next stage changes them."""

    def __init__(self, root: Path, **how: Any) -> None:
        super().__init__(root, **how)
        self.begun: list[torch.Tensor] = []

        def sharded(position: TrainState, *, is_loading: bool) -> dict[str, Any]:
            weights = state(float(position.global_step))
            self.begun += [value.data for name, value in weights["model"].items() if name != "extra"]
            return weights

        self.checkpointer._sharded_state = sharded  # type: ignore[method-assign]

    def train(self) -> None:
        for tensor in self.begun:
            tensor.fill_(-1.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_training_goes_on_and_the_stage_is_finished_when_it_is_committed(root: Path, disk: Disk) -> None:
    job = Training(root)
    told = job.save_final(3)
    job.train()
    assert job.checkpointer.is_writing_final("32k")
    assert not job.checkpointer.is_writing_final("128k")
    job.checkpointer.poll()
    evaluated: list[Path] = []
    job.checkpointer.when_final("32k", lambda committed: evaluated.append(committed.path))
    assert (told, evaluated, job.told(), job.store.committed()) == ([], [], [], [])
    disk.go.set()
    (final,) = job.checkpointer.finals("32k")
    assert (final.meta.stage_final, final.path) == (True, root / "step_00000003")
    assert told == evaluated == [final.path]
    assert job.told() == [("saved", 3)]
    job.checkpointer.when_final("32k", lambda committed: evaluated.append(committed.path))
    assert evaluated == [final.path] * 2
    assert load(CheckpointStore(root)) == 3


def test_the_next_stage_saves_after_it(root: Path, disk: Disk) -> None:
    """No checkpoint of a stage without the final one of the stage before."""
    job = Training(root)
    job.save_final(3)
    threading.Timer(0.3, disk.go.set).start()
    job.save(4)
    assert job.told() == [("saved", 3)]
    job.checkpointer.finish_save()
    assert job.told() == [("saved", 3), ("saved", 4)]


def test_it_is_written_again_with_the_values_that_it_had(root: Path, disk: Disk) -> None:
    disk.refusals = 2
    disk.go.set()
    job = Training(root)
    told = job.save_final(3)
    job.train()
    job.checkpointer.finish_save()
    assert job.told() == [("failed", 3), ("failed", 3), ("saved", 3)]
    assert os.strerror(errno.ENOSPC) in job.events[0].reason
    assert told == [root / "step_00000003"]
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step_00000003"]
    assert load(CheckpointStore(root)) == 3


def test_between_two_attempts_training_goes_on(root: Path, disk: Disk) -> None:
    disk.refusals = 1
    disk.go.set()
    job = Training(root)
    job.checkpointer._patience_s = 0.5  # and so long is waited before the next attempt
    job.save_final(3)
    job.train()
    polls = 0
    while job.told() != [("failed", 3), ("saved", 3)]:
        job.checkpointer.poll()
        polls += 1
    assert polls > 20
    assert load(CheckpointStore(root)) == 3


def test_a_disk_that_stays_full_ends_the_run(root: Path, disk: Disk) -> None:
    disk.refusals = 99
    disk.go.set()
    job = Training(root)
    told = job.save_final(3)
    with pytest.raises(CheckpointError, match="3 consecutive checkpoints could not be written") as caught:
        job.checkpointer.finish_save()
    assert caught.value.exit_code == 5
    assert told == []
    assert job.told() == [("failed", 3)] * 3
    assert job.store.committed() == []
    job.checkpointer.finish_save()  # nothing is left to wait for


def test_a_writer_that_comes_back_writes_it(root: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is stuck no second one writes beside it; what the first one wrote in the end is not mixed in."""
    job = Training(root, deadline_s=0.3)
    job.checkpointer._patience_s = 30.0
    monkeypatch.setattr(checkpointer, "_RETRY_S", 0.2)
    told = job.save_final(3)
    job.train()
    while not job.told():
        job.checkpointer.poll()
    assert "its writer has not moved for" in job.events[0].reason
    disk.go.set()
    for writer in job.store._abandoned:
        writer._thread.join(60)
    job.checkpointer.finish_save()
    assert job.told() == [("failed", 3), ("saved", 3)]
    assert told == [root / "step_00000003"]
    assert load(CheckpointStore(root)) == 3
    assert not list(root.glob("*.tmp-*"))
