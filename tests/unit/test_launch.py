"""What a rank started by srun or torchrun is told, how ranks are started and ended, and the batch script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from m1_stages.errors import EnvironmentProblem
from m1_stages.runtime.signals import StopRequest
from m1cli import launch

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_step_of_srun_becomes_a_rank(slurm: pytest.MonkeyPatch) -> None:
    assert launch.is_worker()
    launch.adopt_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "127.0.0.1", "29500"]


def test_a_rank_of_srun_knows_how_many_share_its_machine(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    launch.adopt_slurm()
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_several_machines_need_an_address(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(EnvironmentProblem, match="several machines"):
        launch.adopt_slurm()


def test_a_batch_script_alone_is_no_rank(slurm: pytest.MonkeyPatch) -> None:
    slurm.delenv("SLURM_STEP_ID")
    assert not launch.is_worker()


def test_torchrun_has_the_last_word(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("RANK", "0")
    launch.adopt_slurm()
    assert os.environ["RANK"] == "0"
    assert "WORLD_SIZE" not in os.environ


def test_one_request_that_arrives_twice_is_one_request() -> None:
    """A second SIGTERM leaves at once: this process would end here."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGTERM"


def test_a_second_request_leaves_at_once() -> None:
    code = (
        "import os, signal; from m1_stages.runtime import signals\n"
        "signals._SAME_REQUEST_S = 0.0\n"
        "with signals.StopRequest():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")


FAKE_M1 = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
if what == "kill 1":
    os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else time.sleep(60)
elif what == "error on 1":
    sys.exit(4) if rank == "1" else time.sleep(60)
elif what == "child":
    os.fork() or time.sleep(60)
    sys.exit(5) if rank == "0" else time.sleep(60)
elif what == "environment":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    os.write(1, (" ".join(os.environ[n] for n in names) + chr(10)).encode())  # in one piece: the ranks share the pipe
"""


@pytest.fixture
def fake_m1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ranks that run a few lines in place of training."""
    (tmp_path / "m1cli.py").write_text(FAKE_M1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("kill 1", 7, "was killed by SIGKILL"),
        ("error on 1", 4, ""),
        ("child", 5, ""),
        ("nothing", 0, ""),
    ],
)
def test_the_first_failure_is_the_exit_code_and_ends_the_others(
    fake_m1: Path, what: str, code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert launch.run_ranks([what], 2, fake_m1) == code
    assert says in capfd.readouterr().err
    assert time.monotonic() - began < 10
    while left := _still_there(what):  # a killed process is there for a moment
        assert time.monotonic() - began < 15, f"{left}: no rank and no child of one"
        time.sleep(0.05)


def _still_there(what: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:] == ["-m", "m1cli", what]]


def test_the_printed_line_starts_the_same_ranks(fake_m1: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.run_ranks(["environment"], 2, fake_m1) == 0
    shown = capfd.readouterr().out
    started = sorted(line for line in shown.splitlines() if re.match(r"\d \d 2 2 127", line))
    assert started == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]
    (loop,) = [line for line in shown.splitlines() if line.startswith("  for r in 0 1; do ")]
    by_hand = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, timeout=60).stdout
    assert sorted(by_hand.splitlines()) == started
    assert "torchrun --standalone --nproc-per-node=2 -m m1cli environment" in shown


def m1(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m1cli", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def shims(folder: Path) -> Path:
    """``srun`` that notes what it got and leaves with FAKE_CODE, ``scontrol`` that notes and knows one host."""
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$MASTER_ADDR $MASTER_PORT $PYTHONSAFEPATH" "$PWD" "$@" > "$NOTES/srun"\nexit "$FAKE_CODE"\n'
    )
    (folder / "bin" / "scontrol").write_text(
        '#!/bin/bash\nif [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$*" >> "$NOTES/scontrol"; fi\n'
    )
    for shim in (folder / "bin").iterdir():
        shim.chmod(0o755)
    return folder / "bin"


def test_the_batch_script_requeues_on_75_only(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "m1.toml").write_text('preset = "tiny"\n')
    done = m1("launch", "slurm", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--partition", "gpu",
              "--account", "me", "--sbatch=--qos=high", "--", "pretrain", "--stage", "all", "--set", "run.dir=a b",
              cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "submit it with:  sbatch m1.sbatch" in done.stdout
    script = folder / "m1.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    lines = script.read_text().splitlines()
    for wanted in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=1:00:00", "partition=gpu", "account=me",
                   "requeue", "signal=TERM@300", "open-mode=append", "qos=high", "job-name=m1"):  # fmt: skip
        assert f"#SBATCH --{wanted}" in lines
    path = f"{shims(tmp_path)}:{os.environ['PATH']}"
    for code in (0, 2, 7, 75, 143):
        env = {**os.environ, "PATH": path, "NOTES": str(tmp_path), "FAKE_CODE": str(code), "SLURM_JOB_ID": "1234567",
               "SLURM_JOB_NODELIST": "node[1-2]"}  # fmt: skip
        ran = subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == code, ran.stderr
        assert (tmp_path / "scontrol").exists() == (code >= 75)
        if code == 75:
            assert (tmp_path / "scontrol").read_text() == "requeue 1234567\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 1234567\n", "only for 75"
    environment, where, *words = (tmp_path / "srun").read_text().splitlines()
    assert environment == "node1 24567 1"
    assert where == str(folder)
    assert "--kill-on-bad-exit=0" in words
    assert words[words.index("-m") :] == ["-m", "m1cli", "pretrain", "--stage", "all", "--set", "run.dir=a b"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--", "report"], "report cannot be launched"),
        (["--", "pretrain", "--stage", "all", "--fresh"], "--fresh would start over after every requeue"),
        (["--", "pretrain", "--stage", "all", "--config", "none.toml"], "there is no configuration file"),
        (["--gpus-per-node=3", "--", "pretrain", "--stage", "all", "--set", "parallel.tensor=2"], "does not divide the 3 ranks"),
        (["--job-name=a b", "--", "sft"], "without spaces"),
        (["--out=taken", "--", "sft"], "there is another file of this name"),
    ],
)  # fmt: skip
def test_what_would_fail_on_the_cluster_is_refused_here(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "m1.toml").write_text('preset = "tiny"\n')
    (tmp_path / "taken").write_text("mine")
    done = m1("launch", "slurm", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert (tmp_path / "taken").read_text() == "mine"
    assert not (tmp_path / "m1.sbatch").exists()


def test_gpus_asks_for_that_many_processes(tmp_path: Path) -> None:
    (tmp_path / "m1.toml").write_text('preset = "tiny"\n[parallel]\nprocesses = 4\n')
    done = m1("pretrain", "--stage", "32k", "--gpus", "2", cwd=tmp_path)
    assert "starting 2 processes" in done.stdout
    assert done.returncode == 4, "no data was prepared"
    assert done.stderr.count("there is no prepared data") == 1, "rank 0 speaks for both"
