"""Ranks are killed, stopped and orphaned: the run says so, ends whole, and the same command continues it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run

NUM_STEPS, DEADLINE_S = 12, 4
M1 = [sys.executable, "-m", "m1cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process states and prctl are Linux's")


class Training:
    """One run directory, and the command that trains it."""

    def __init__(self, prepared: Path, run_dir: Path) -> None:
        self.folder, self.run_dir = prepared, run_dir
        self.options = ["pretrain", "--stage", "32k", "--set", f"run.dir={run_dir}", "--set", "parallel.expert=2",
                        "--set", f"stages.32k.tokens={NUM_STEPS * 1024}", "--set", "run.save_every_steps=2",
                        "--set", "run.threads=1", "--set", f"parallel.timeout_s={DEADLINE_S}"]  # fmt: skip
        self.command = [*M1, *self.options, "--gpus", "2"]

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENV} | options
        return subprocess.Popen(command, cwd=self.folder, **pipes)

    def steps(self) -> dict[int, str]:
        """Exact loss and gradient norm by global step; the last time a step was made counts."""
        metrics = self.run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return {r["global_step"]: f"{r['loss']!r} {r['grad_norm']!r}" for r in records if r["event"] == "StepDone"}

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 90
        while len(self.steps()) <= step:
            assert time.monotonic() < deadline, f"step {step} was not made"
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        return int(json.loads((self.run_dir / "ranks" / f"rank-{rank}.json").read_text())["pid"])

    def processes(self) -> list[str]:
        """Everything that still runs for this run directory."""
        found = []
        for process in psutil.process_iter(["pid", "status", "cmdline"]):
            if str(self.run_dir) in " ".join(process.info["cmdline"] or []):
                found.append(f"{process.info['pid']} {process.info['status']}")
        return found

    def none_left(self) -> bool:
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.processes() == []

    def final(self) -> Path:
        return self.run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run that nothing happens to, under two torchrun agents as on two machines."""
    training = Training(prepared, tmp_path_factory.mktemp("uninterrupted") / "run")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    agent = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
             "--rdzv-id=lost", "--local-addr=127.0.0.1", "-m", "m1cli", *training.options]  # fmt: skip
    agents = [training.start(agent) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], outputs
    assert len(training.steps()) == NUM_STEPS
    assert not (training.run_dir / "ranks").exists()
    assert not (training.run_dir / "stacks").exists(), "a run that ended well leaves nothing of the watch"
    return training


@pytest.fixture
def training(prepared: Path, tmp_path: Path) -> Iterator[Training]:
    training = Training(prepared, tmp_path / "run")
    yield training
    for line in training.processes():
        psutil.Process(int(line.split()[0])).kill()


def same_weights(one: Path, other: Path) -> bool:
    """Whether every tensor of two checkpoints is equal, read without Megatron."""
    mine, theirs = tensors_of(one), tensors_of(other)
    assert len(mine) > 50, "weights and both Adam moments"
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_ranks_lost_under_the_own_launcher(training: Training, uninterrupted: Training) -> None:
    """One run is cut five times in different ways and ends where the uncut one does."""
    _a_killed_rank_ends_the_run(training)
    _a_stopped_rank_is_named_and_ended(training)
    _a_killed_launcher_takes_its_ranks_along(training)
    _control_c_saves_once(training)
    output, _ = (process := training.start(training.command)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert training.steps() == uninterrupted.steps()
    assert same_weights(training.final(), uninterrupted.final())


def _a_killed_rank_ends_the_run(training: Training) -> None:
    process = training.start(training.command)
    training.wait_for_step(2, process)
    pid = training.pid(1)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7, output
    assert f"rank 1 (process {pid}) was killed by SIGKILL" in output
    assert output.count("error") == 1, f"one message, not one for each rank: {output}"
    assert "Traceback" not in output
    assert time.monotonic() - began < 10
    assert training.none_left(), training.processes()


def _a_stopped_rank_is_named_and_ended(training: Training) -> None:
    process = training.start(training.command)
    training.wait_for_step(4, process)  # the next save is a step away, and a save has more time
    pid = training.pid(1)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7, output
    assert re.search(rf"no progress for \d+ s in step \d+ \(\w+\): rank 1 \(process {pid} on .*\) is stopped", output)
    assert "Traceback" not in output
    assert time.monotonic() - began < 3 * DEADLINE_S + 10, (
        "the deadline is three times as long when it falls into a save"
    )
    assert training.none_left(), training.processes()
    for rank in (0, 1):
        stack = (training.run_dir / "stacks" / f"rank-{rank}.txt").read_text()
        assert "loop.py" in stack, f"where rank {rank} was, the stopped one too: {stack}"


def _a_killed_launcher_takes_its_ranks_along(training: Training) -> None:
    process = training.start(training.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    training.wait_for_step(6, process)
    assert len(training.processes()) == 3
    process.kill()
    process.wait()
    assert training.none_left(), training.processes()


def _control_c_saves_once(training: Training) -> None:
    """A terminal sends Ctrl-C to all processes of the foreground; each rank must take it for one request."""
    terminal, end = pty.openpty()
    process = training.start(
        training.command, stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(end)
    shown = bytearray()
    reader = threading.Thread(target=_drain, args=(terminal, shown.extend))
    reader.start()
    training.wait_for_step(8, process)
    os.write(terminal, b"\x03")
    assert process.wait(timeout=60) == 75, shown.decode()
    reader.join()
    assert shown.count(b"run the same command again to continue") == 1
    assert training.none_left(), training.processes()


def _drain(terminal: int, keep: Callable[[bytes], None]) -> None:
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux's end of file
            break
        keep(data)
    os.close(terminal)


def test_ranks_lost_under_torchrun_and_slurm(training: Training, uninterrupted: Training, tmp_path: Path) -> None:
    """Killed under torchrun, continued and requeued by the batch script."""
    process = training.start([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "m1cli", *training.options])
    training.wait_for_step(3, process)
    pid = training.pid(1)
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Signal 9 (SIGKILL)" in output
    assert training.none_left(), training.processes()

    assert _batch_script(training, tmp_path) == 75
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 77"

    made = training.steps()
    assert len(made) > 7
    assert made.items() <= uninterrupted.steps().items()


def _batch_script(training: Training, folder: Path) -> int:
    """Run what ``m1 launch slurm`` writes with an ``srun`` that starts ranks here and signals them as Slurm does."""
    shims = folder / "bin"
    shims.mkdir()
    (shims / "scontrol").write_text(f'#!/bin/bash\necho "$*" >> {folder}/scontrol\n[ "$1" = show ] && echo 127.0.0.1\n')
    (shims / "srun").write_text(
        '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\n'
        "export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=2\n"
        'for r in 0 1; do SLURM_PROCID=$r SLURM_LOCALID=$r "$@" & pids+=($!); done\n'
        f"echo ${{pids[*]}} > {folder}/pids\n"
        'code=0; for p in "${pids[@]}"; do wait $p; c=$?; [ $c -gt $code ] && code=$c; done; exit $code\n'
    )
    for shim in shims.iterdir():
        shim.chmod(0o755)
    script = folder / "m1.sbatch"
    written = training.start([*M1, "launch", "slurm", "--gpus-per-node=2", f"--out={script}", "--", *training.options])
    assert written.wait(timeout=30) == 0, written.communicate()
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here", "PATH": f"{shims}:{os.environ['PATH']}"}
    process = training.start(["bash", str(script)], env=ENV | slurm)
    training.wait_for_step(7, process)
    for pid in (folder / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    process.communicate(timeout=60)
    assert training.none_left(), training.processes()
    return process.returncode


WATCHED = """
import sys, time
from pathlib import Path
from m1_stages.runtime.watchdog import Watchdog, heartbeat
folder, what = Path(sys.argv[1]), sys.argv[2]
with Watchdog(folder, rank=0, world=int(sys.argv[3]), deadline_s=1.0, on_expired=lambda e: print(e.what, flush=True)):
    heartbeat("train", 7)
    print("started", flush=True)
    if what == "hang":
        time.sleep(60)
    for _ in range(20):
        time.sleep(0.1)
        heartbeat("train", 8)
print("done", flush=True)
"""


def watched(folder: Path, what: str, world: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WATCHED, str(folder), what, str(world)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_a_rank_that_hangs_alone_writes_its_stack_and_leaves(tmp_path: Path) -> None:
    process = watched(tmp_path, "hang", 1)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 7, errors
    assert output == "no progress for 1 s in step 7 (train): its stack says where\n"
    assert 'File "<string>", line 10' in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_the_rank_behind_the_others_is_named(tmp_path: Path) -> None:
    process = watched(tmp_path, "hang", 2)
    record = {"rank": 1, "pid": os.getpid(), "host": socket.gethostname(), "phase": "data", "step": 7}
    (tmp_path / "ranks" / "rank-1.json").write_text(json.dumps(record | {"alive": time.time() + 5}))
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 7, errors
    assert output == "no progress for 1 s in step 7 (train): behind the others: rank 1 in step 7 (data)\n"


def test_a_run_that_was_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    process = watched(tmp_path, "work", 1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "done\n"), errors
    assert list(tmp_path.iterdir()) == []
