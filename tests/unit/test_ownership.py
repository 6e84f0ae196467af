"""What a killed process left behind is told from the work of a running one, and from what belongs to the user."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1_data.storage.ownership import sweep_siblings, temporary_sibling
from m1_data.storage.process import ProcessId, is_running, this_process

NAME = """
import sys
from pathlib import Path
from m1_data.storage.ownership import temporary_sibling
print(temporary_sibling(Path(sys.argv[1])))
"""


def sibling_of_the_dead(path: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", NAME, str(path)], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def test_a_process_is_known_by_its_start_too() -> None:
    me = this_process()
    assert is_running(me) is True
    assert is_running(ProcessId(me.machine, me.pid, me.started + 1)) is False, "the number was given to another process"
    assert is_running(ProcessId("elsewhere", me.pid, me.started)) is None
    assert ProcessId.parse(str(me)) == me
    assert [ProcessId.parse(text) for text in ("", "a-b-c", "a-1", "a-1-2-3")] == [None] * 4


def test_a_process_that_ended_and_was_not_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    process = ProcessId(this_process().machine, child.pid, started)
    deadline = time.monotonic() + 10
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_running(process) is False
    assert child.wait() == 0


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_only_what_a_dead_process_left_is_swept(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "mine.txt").write_text("mine")
    dead, alive = sibling_of_the_dead(out), temporary_sibling(out)
    assert dead.parent == alive.parent == tmp_path
    if kind == "folder":
        dead.mkdir()
        (dead / "part").write_text("x")
    elif kind == "file":
        dead.write_text("x")
    else:
        dead.symlink_to(keep)
    alive.mkdir()
    others = [".model.tmp-", ".model.tmp-12345678", ".model.tmp-a-1-1-x", "model.tmp-1", ".other.tmp-" + dead.name[-8:]]
    for name in others:
        (tmp_path / name).write_text("mine")
    sweep_siblings(out)
    assert not os.path.lexists(dead)
    assert alive.is_dir()
    assert (keep / "mine.txt").read_text() == "mine"
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_another_machine_is_given_a_day(tmp_path: Path) -> None:
    young, old = (tmp_path / f".model.tmp-0123456789ab-7-7-{n * 8}" for n in "12")
    for path, age in ((young, 23), (old, 25)):
        path.mkdir()
        os.utime(path, (time.time() - age * 3600,) * 2)
    sweep_siblings(tmp_path / "model")
    assert young.is_dir()
    assert not old.exists()
    sweep_siblings(tmp_path / "nowhere" / "model")
