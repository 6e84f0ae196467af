"""Saving that is slow, stuck, killed or out of space: training goes on, and no good checkpoint is lost.

Numbers are those of docs/reliability.md.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_on_ranks
from support.saving import Job
from support.tiny_checkpoint import load, meta, save, state

from m1_stages.checkpoint import CheckpointStore, files
from m1_stages.checkpoint import store as store_module
from m1_stages.checkpoint.writer_thread import Progress, Writer
from m1_stages.config import ParallelConfig
from m1_stages.errors import CheckpointError
from m1_stages.runtime import device, parallel


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


class Gate:
    """Holds the writer of a checkpoint before its first byte, as a stuck file system does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.arrived = threading.Event(), threading.Event()
        self._patch = patch
        patch.setattr(files, "open", self._open, raising=False)

    def _open(self, *args: Any) -> Any:
        self.arrived.set()
        assert self.open.wait(60)
        return builtins.open(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_what_is_saved_is_the_state_of_the_save_step(root: Path, gate: Gate) -> None:
    """18: the optimizer changes every tensor in place before the writer writes its first byte."""
    store = CheckpointStore(root)
    weights = state(10.0)
    tensors = [tensor.data for name, tensor in weights["model"].items() if name != "extra"]
    store.begin(weights, meta(10))
    assert gate.arrived.wait(60)
    for tensor in tensors:
        tensor.mul_(-3.0)
    assert store.poll() is None
    assert store.saving
    gate.open.set()
    assert store.poll(wait=True) == root / "step_00000010"
    assert not store.saving
    assert float(tensors[0][0, 0]) == -30.0
    assert load(CheckpointStore(root)) == 10


def test_without_the_copy_it_would_not_be(root: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that the test above must catch."""
    monkeypatch.setattr(store_module.Snapshot, "copy", lambda self: None)
    store = CheckpointStore(root)
    weights = state(10.0)
    tensors = [tensor.data for name, tensor in weights["model"].items() if name != "extra"]
    store.begin(weights, meta(10))
    for tensor in tensors:
        tensor.mul_(-3.0)
    gate.open.set()
    store.poll(wait=True)
    with pytest.raises(AssertionError):
        load(CheckpointStore(root))


def test_one_save_at_a_time_and_the_last_one_waits(root: Path, gate: Gate) -> None:
    job = Job(root)
    job.save(1)
    job.checkpointer.poll()
    assert job.told() == []
    gate.open.set()
    job.save(2)  # first waits for the one before it
    assert job.told() == [("saved", 1)]
    path = job.save_now(3)
    assert job.told() == [("saved", 1), ("saved", 2), ("saved", 3)]
    assert path.name == "step_00000003"
    job.checkpointer.poll()
    job.checkpointer.finish_save()
    assert [c.meta.global_step for c in job.store.committed()] == [3, 2]
    saved = job.events[0]
    assert 0 < saved.stall_s <= saved.seconds


def test_in_the_foreground_a_save_is_committed_when_it_returns(root: Path) -> None:
    job = Job(root, background=False)
    job.save(1)
    assert job.told() == [("saved", 1)]
    assert load(CheckpointStore(root)) == 1


def failing_open(error: int, fails: Callable[[Path], bool]) -> Callable[..., Any]:
    """``open`` that fails for files being written, or gives a file whose writes do."""

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            raise OSError(error, os.strerror(error), self._file.name)

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" not in mode or not fails(Path(path)):
            return builtins.open(path, mode, *args, **options)
        if error in (errno.EROFS, errno.EACCES):
            raise OSError(error, os.strerror(error), str(path))
        return Full(builtins.open(path, mode, *args, **options))

    return opened


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_save_that_fails_is_told_and_the_next_one_tried(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: int, background: bool
) -> None:
    """15: training goes on; after three consecutive failures it stops with exit code 5; a good one starts a new count."""
    job = Job(root, background=background)
    job.save_and_wait(1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", failing_open(error, lambda path: path.suffix == ".distcp"), raising=False)
        job.save_and_wait(2, 3)
    job.save(4)
    job.checkpointer.finish_save()
    assert job.told() == [("saved", 1), ("failed", 2), ("failed", 3), ("saved", 4)]
    assert os.strerror(error) in job.events[1].reason
    assert "MiB are free there" in job.events[1].reason
    assert not list(root.glob("*.tmp-*"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", failing_open(error, lambda path: path.suffix == ".distcp"), raising=False)
        with pytest.raises(CheckpointError, match="3 consecutive checkpoints could not be written") as caught:
            job.save_and_wait(5, 6, 7)
        assert caught.value.exit_code == 5
        with pytest.raises(CheckpointError, match=os.strerror(error)):
            job.save_now(8)
    assert load(CheckpointStore(root)) == 4


def test_a_disk_that_gives_back_something_else_is_noticed_before_the_commit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lying:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            return int(self._file.write(bytes(len(data))))

    monkeypatch.setattr(files, "open", lambda *args: Lying(builtins.open(*args)), raising=False)  # noqa: SIM115
    store = CheckpointStore(root)
    with pytest.raises(CheckpointError, match="gives back something else than was written"):
        save(store, 1)
    assert store.committed() == []


def test_a_stuck_writer_is_abandoned_and_training_goes_on(root: Path, gate: Gate) -> None:
    """16: within the deadline, with all stacks; no second writer beside a stuck one; the older checkpoint is intact."""
    gate.open.set()
    job = Job(root, deadline_s=0.4)
    job.save_now(1)
    gate.open.clear()
    job.save(2)
    job.checkpointer.finish_save()
    assert job.told() == [("saved", 1), ("failed", 2)]
    assert "its writer has not moved for" in job.events[1].reason
    assert len(job.stuck) == 1
    job.save(3)
    assert job.told()[2:] == [("failed", 3)]
    assert "still stuck" in job.events[2].reason
    gate.open.set()
    for writer in job.store._abandoned:
        writer._thread.join(60)
    job.save(4)
    job.checkpointer.finish_save()
    assert job.told()[3:] == [("saved", 4)]
    assert load(CheckpointStore(root)) == 4
    assert not list(root.glob("*.tmp-*")), "what the stuck writer left is swept"


def test_a_writer_that_stays_stuck_ends_the_run(root: Path, gate: Gate) -> None:
    job = Job(root, deadline_s=0.4)
    job.save(1)
    with pytest.raises(CheckpointError, match="3 consecutive checkpoints could not be written") as caught:
        job.save(2, 3, 4)
    assert caught.value.exit_code == 5
    assert job.told() == [("failed", 1), ("failed", 2), ("failed", 3)]


def test_only_waiting_that_is_seen_counts_as_stuck() -> None:
    """A process that was suspended for longer than the deadline finds its writer where it left it."""
    go = threading.Event()
    writer = Writer(lambda moved: {"waited": (int(go.wait(60)), "")}, deadline_s=4.0)
    writer._looked -= 3600.0
    assert writer.progress() == Progress.WRITING
    assert writer.stuck_for() == 1.0
    for _ in range(4):
        writer._looked -= 3600.0
        stuck = writer.progress()
    assert stuck == Progress.STUCK
    go.set()
    assert writer.progress(60.0) == Progress.DONE


STUCK_RUN = """
import os, sys
from pathlib import Path
from m1_stages.checkpoint.files import sha256_of
from m1_stages.runtime.watchdog import Watchdog, heartbeat
folder = Path(sys.argv[1])
os.mkfifo(folder / "shard")  # to open it takes for ever
with Watchdog(folder, rank=0, world=1, deadline_s=0.5, on_expired=lambda e: print(e.what, flush=True)):
    heartbeat("build", 0)
    sha256_of(folder / "shard")
"""


def test_a_load_that_never_ends_is_ended(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK_RUN, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert "no progress for" in done.stdout
    assert "(build)" in done.stdout
    assert "sha256_of" in (tmp_path / "stacks" / "rank-0.txt").read_text()


@pytest.mark.parametrize("point", ["Snapshot", "Writer", "manifest_text", "flush", "write_atomically"])
def test_dying_at_any_point_leaves_the_older_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    class Dead(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Dead

    store = CheckpointStore(root)
    for step in (10, 20):
        save(store, step)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, point, die)
        with pytest.raises(Dead):
            save(store, 30)
    again = CheckpointStore(root)
    assert load(again) == 20
    save(again, 30)
    assert load(CheckpointStore(root)) == 30
    assert not list(root.glob("*.tmp-*")), "what the dead save left is swept"


KILLED = ["in the snapshot", "in the writer", "before the manifest", "before the rename", "before LATEST"]


def test_killed_at_each_point_of_the_protocol(root: Path) -> None:
    """12: SIGKILL; the checkpoint before it is used, or the new one once it has its name; no half directory ever."""
    job = {"root": str(root)}
    (codes,) = run_on_ranks(1, "faults.killed_save_worker:kill_at_each_point", job, fresh=True, timeout_s=120)
    for number, point in enumerate(KILLED):
        place = root / str(number)
        assert codes[point] == -signal.SIGKILL
        store = CheckpointStore(place)
        assert load(store) == (30 if point == "before LATEST" else 20)
        left = [path.name for path in place.glob("step_*.tmp-*")]
        assert (left == []) == (point == "before LATEST")
        store.sweep()
        save(store, 40)
        assert load(CheckpointStore(place)) == 40
        assert (place / "LATEST").read_text() == "step_00000040\n"


def test_retention_keeps_the_newest_and_every_stage_final(root: Path) -> None:
    store = CheckpointStore(root, keep_last=2)
    for step in range(1, 9):
        save(store, step, final=step in (3, 6))
    assert [c.meta.global_step for c in store.committed()] == [8, 7, 6, 3]


def test_retention_counts_checkpoints_that_are_known_to_be_good(root: Path) -> None:
    """19: what an earlier process wrote is not taken on trust, and a missing file is noticed before an older one goes."""
    first = CheckpointStore(root)
    for step in (1, 2):
        save(first, step)
    second = CheckpointStore(root)  # a restart that did not load anything
    save(second, 3)
    assert [c.meta.global_step for c in second.committed()] == [3, 2, 1], "one verified checkpoint is not two"
    save(second, 4)
    assert [c.meta.global_step for c in second.committed()] == [4, 3]
    (root / "step_00000004" / "metadata.json").unlink()
    save(second, 5)
    assert [c.meta.global_step for c in second.committed()] == [5, 4, 3]
    shutil.rmtree(root / "step_00000005")
    assert load(CheckpointStore(root)) == 3


def test_a_restart_that_loaded_counts_what_it_loaded(root: Path) -> None:
    for step in (1, 2):
        save(CheckpointStore(root), step)
    store = CheckpointStore(root)
    assert load(store) == 2
    save(store, 3)
    assert [c.meta.global_step for c in store.committed()] == [3, 2]


def test_killed_while_removing_an_old_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """19: it loses its name first, so half a checkpoint is never a candidate."""
    store = CheckpointStore(root)
    for step in (1, 2):
        save(store, step)

    def dies(path: Path, **options: Any) -> None:
        (path / "metadata.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        save(store, 3)
    monkeypatch.undo()
    again = CheckpointStore(root)
    assert [c.meta.global_step for c in again.committed()] == [3, 2]
    again.sweep()
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step_00000002", "step_00000003"]
    assert load(again) == 3
