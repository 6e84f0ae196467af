"""One writer at a time, readers beside each other, and locks whose holder is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m1_data.errors import ConfigError, InUse
from m1_data.storage import lock as module
from m1_data.storage.lock import STALE_S, Holder, lock_of, reading, refuse_while_written, writing
from m1_data.storage.process import this_process

HOLD = """
import sys, time
from pathlib import Path
from m1_data.storage.lock import reading, writing
sys.argv = ["m1", "pretrain", "--stage", "32k"]
with {kind}(Path({path!r}), "the folder"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_by_another(path: Path, kind: str = "writing") -> Iterator[subprocess.Popen[str]]:
    code = HOLD.format(kind=kind, path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def left_behind(path: Path, *, age_s: float, process: str = "elsewhere-7-7") -> None:
    path.write_bytes(Holder(process, "node7", "m1 sft", time.time() - age_s, "token").to_bytes())
    os.utime(path, (time.time() - age_s,) * 2)


def test_a_second_writer_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with held_by_another(path) as holder:
        before = path.read_bytes()
        for look in (lambda: writing(path, "the folder").__enter__(), lambda: refuse_while_written(path, "the folder")):
            began = time.monotonic()
            with pytest.raises(
                InUse, match="the folder is in use by another command: m1 pretrain --stage 32k"
            ) as caught:
                look()
            assert time.monotonic() - began < 2
            assert f"process {holder.pid} on " in caught.value.where
            assert time.strftime("since %Y-%m-%d") in caught.value.where
            assert caught.value.exit_code == 8
        assert path.read_bytes() == before
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with writing(path, "the folder"):
            assert Holder.parse(path.read_bytes()) is not None, "a killed holder is recognised at once"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "run.lock", "it"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_readers_do_not_matter_to_each_other_but_keep_a_writer_away(tmp_path: Path) -> None:
    path = tmp_path / "data.lock"
    with held_by_another(path, "reading"), pytest.raises(InUse, match="m1 pretrain"), writing(path, "the data"):
        raise AssertionError
    with held_by_another(path, "reading"), reading(path, "the data"):
        with pytest.raises(InUse, match="the data is in use"), writing(path, "the data"):
            raise AssertionError
        assert not path.exists(), "the refused writer leaves no lock"
        refuse_while_written(path, "the data")
    with writing(path, "the data"):
        assert [entry.name for entry in tmp_path.iterdir()] == ["data.lock"], "the killed reader's mark is gone"
        with pytest.raises(InUse), reading(path, "the data"):
            raise AssertionError
        assert [entry.name for entry in tmp_path.iterdir()] == ["data.lock"], "the refused reader leaves no mark"


@pytest.mark.parametrize(("age_s", "gone"), [(STALE_S - 5, False), (STALE_S + 1, True)])
def test_a_holder_elsewhere_is_gone_when_it_is_silent_for_a_minute(tmp_path: Path, age_s: float, gone: bool) -> None:
    path = tmp_path / "run.lock"
    left_behind(path, age_s=age_s)
    if gone:
        with writing(path, "it"):
            assert Holder.parse(path.read_bytes()).process == str(this_process())  # type: ignore[union-attr]
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(InUse, match="m1 sft") as caught, writing(path, "it"):
            raise AssertionError
        assert "on node7" in caught.value.where
        assert "60 s after" in caught.value.fix
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]


def test_the_mark_of_a_killed_reader_is_swept_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "data.lock"
    with held_by_another(path, "reading"), held_by_another(path, "reading") as killed:
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 2
        with reading(path, "the data"):
            names = [entry.name for entry in tmp_path.iterdir()]
            assert len(names) == 2
            assert not [name for name in names if f"-{killed.pid}-" in name]
            assert [name for name in names if f"-{os.getpid()}-" in name]


def test_a_number_that_was_given_to_another_process_is_no_holder(tmp_path: Path) -> None:
    me = this_process()
    left_behind(tmp_path / "run.lock", age_s=0, process=f"{me.machine}-{me.pid}-{me.started + 1}")
    with writing(tmp_path / "run.lock", "it"):
        pass


def test_a_file_of_somebody_else_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "data.lock"
    path.write_text("pinned versions")
    os.utime(path, (0, 0))
    with pytest.raises(ConfigError, match="not written by m1"), writing(path, "it"):
        raise AssertionError
    assert path.read_text() == "pinned versions"


def test_an_empty_lock_of_a_crashed_machine_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.touch()
    with pytest.raises(InUse), writing(path, "it"):
        raise AssertionError
    os.utime(path, (time.time() - STALE_S - 1,) * 2)
    with writing(path, "it"):
        pass


def test_a_sign_of_life_is_given_and_a_lost_lock_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    with writing(path, "it") as lock:
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < time.time() - 5:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.01)
        lock.require_held()
        left_behind(path, age_s=0)
        taken = path.read_bytes()
        with pytest.raises(InUse, match="lost its lock"):
            _look_until(deadline, lock.require_held)
    assert path.read_bytes() == taken, "the lock of the other one stays"


def _look_until(deadline: float, look: Callable[[], None]) -> None:
    while time.monotonic() < deadline:
        look()
        time.sleep(0.01)


def test_a_forked_process_does_not_give_its_parents_lock_back(tmp_path: Path) -> None:
    with writing(tmp_path / "run.lock", "it") as lock:
        child = os.fork()
        if not child:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "run.lock").exists()


def test_of_many_starts_on_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    path, enough = tmp_path / "run.lock", tmp_path / "enough"
    left_behind(path, age_s=STALE_S + 100)
    children = set()
    for _ in range(20):
        child = os.fork()
        children.add(child)
        if not child:
            try:
                with writing(path, "it"):
                    _look_until(time.monotonic() + 60, lambda: os._exit(0) if enough.exists() else None)
            except InUse:
                os._exit(8)
            finally:
                os._exit(1)
    codes = []
    deadline = time.monotonic() + 60
    while children and time.monotonic() < deadline:
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if len(codes) == 19:
            enough.touch()  # the holder stays until all others have been refused
        time.sleep(0.02)
    assert sorted(codes) == [0] + [8] * 19


def test_where_nothing_can_be_written_data_is_read_without_a_mark(tmp_path: Path) -> None:
    with reading(tmp_path / "missing" / "data.lock", "it"):
        assert list(tmp_path.iterdir()) == []


def test_the_lock_of_linked_data_is_where_the_data_is(tmp_path: Path) -> None:
    (tmp_path / "real" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "data")
    assert (
        lock_of(tmp_path / "link") == lock_of(tmp_path / "real" / "data") == tmp_path.resolve() / "real" / "data.lock"
    )
