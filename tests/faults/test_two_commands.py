"""A second command in a live directory is refused at once or only reads; signals and terminals that are gone lose nothing."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.small_disk import fill, small_disk
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run
from support.trees import tree

from m1_data.storage.lock import lock_of, writing

M1 = [sys.executable, "-m", "m1cli"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
WRITERS = {
    "pretrain": ["pretrain", "--stage", "32k"],
    "two ranks": ["pretrain", "--stage", "32k", "--gpus", "2"],
    "sft": ["sft"],
    "evaluate": ["evaluate", "--stage", "32k"],
    "prepare-data": ["prepare-data", "--set", "data.verify_docs=5"],
}
READERS = {
    "stages": (["stages"], 0),
    "up to date": (["prepare-data"], 0),
    "report": (["report", "--out", "page.html"], 0),
    "export": (["export", "--out", "model", "--overwrite"], 5),
}
"""Commands that only read, and their exit code while a first stage trains."""


class Project:
    """A configuration with prepared data and, while it trains, a process."""

    def __init__(self, folder: Path, *, steps: int = 64) -> None:
        folder.mkdir()
        self.folder, self.run_dir, self.stopped = folder, folder / "run", 0
        make_run(folder)
        text = (folder / "m1.toml").read_text().replace("save_every_steps = 100", "save_every_steps = 2")
        text = text.replace("[stages.32k]\ntokens = 6144", f"[stages.32k]\nmax_epochs = 1000\ntokens = {1024 * steps}")
        (folder / "m1.toml").write_text(text)
        assert self.m1("prepare-data").returncode == 0

    def m1(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*M1, *arguments], cwd=self.folder, env=ENV, capture_output=True, text=True, timeout=120)

    def start(self, *arguments: str, redirect: str = "") -> subprocess.Popen[str]:
        line = f"exec {' '.join([*M1, *(arguments or WRITERS['pretrain'])])} {redirect}"
        return subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def next_run(self) -> None:
        """Put the run directory aside, so that the next command starts anew."""
        self.run_dir.rename(self.folder / f"run-{len(list(self.folder.glob('run-*')))}")

    def steps(self) -> list[int]:
        return [event["global_step"] for event in self.events("StepDone")]

    def events(self, *names: str) -> list[dict[str, object]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [event for event in found if not names or event["event"] in names]

    def start_and_hold(self) -> subprocess.Popen[str]:
        """Start training and wait until it holds the lock of the run."""
        self.stopped = len(self.events("RunStopped"))
        process, path, deadline = self.start(), self.run_dir / "run.lock", time.monotonic() + 120
        while not (path.exists() and f"-{process.pid}-" in path.read_text()):
            assert time.monotonic() < deadline, "the lock was not taken"
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        return process

    def is_at_work(self, process: subprocess.Popen[str]) -> bool:
        """Whether the process has not come to its end; afterwards it still takes a moment to leave."""
        return process.poll() is None and len(self.events("RunStopped")) == self.stopped

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while len(self.steps()) < step:
            assert time.monotonic() < deadline, f"step {step} was not made"
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    def final(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.run_dir / "checkpoints" / "step_00000064")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def _refused(project: Project, name: str, holder: int) -> None:
    began = time.monotonic()
    done = project.m1(*WRITERS[name])
    assert done.returncode == 8, f"{name}: {done.stdout}{done.stderr}"
    assert time.monotonic() - began < 10
    assert "in use by another command: m1 pretrain --stage 32k" in done.stderr
    assert f"process {holder} on " in done.stderr


def test_a_second_command_beside_training_is_refused_or_only_reads(tmp_path: Path) -> None:
    _beside_training(tmp_path, ["two ranks", "prepare-data"], ["stages", "up to date"])


@pytest.mark.faults
def test_every_second_command_beside_training(tmp_path: Path) -> None:
    _beside_training(tmp_path, list(WRITERS), list(READERS))


def _beside_training(tmp_path: Path, writers: list[str], readers: list[str]) -> None:
    project = Project(tmp_path / "project", steps=4000)
    process = project.start()
    project.wait_for_step(3, process)
    data = tree(project.folder / "data")
    for name in writers:
        _refused(project, name, process.pid)
    for name in readers:
        arguments, code = READERS[name]
        done = project.m1(*arguments)
        assert done.returncode == code, f"{name}: {done.stdout}{done.stderr}"
    assert process.poll() is None, "all of this happened beside the training"
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped on SIGHUP after saving stage 32k" in err
    assert tree(project.folder / "data") == data
    assert project.steps() == list(range(len(project.steps()))), "every step was made once"
    assert project.events("SaveFailed", "CheckpointRejected") == []
    assert len(project.events("RunStarted")) == 1, "a refused or reading command reports nothing there"
    assert not list(project.folder.rglob("*.lock*")), "the locks are given back"


def test_a_preparation_is_alone_with_its_data_and_is_stopped_in_one_line(project: Project) -> None:
    with writing(lock_of(project.folder / "data"), "the data"):
        for name in ("prepare-data", "pretrain"):
            done = project.m1(*WRITERS[name])
            assert done.returncode == 8, done.stdout + done.stderr
            assert f"process {os.getpid()} on " in done.stderr
    texts = "".join(json.dumps({"text": f"document {n} " + "word " * 400}) + "\n" for n in range(20_000))
    (project.folder / "words.jsonl").write_text(texts)
    process = project.start("prepare-data")
    deadline = time.monotonic() + 60
    while not (project.folder / "data.partial").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.splitlines() == [
        "stopped: stopped on SIGTERM; nothing unfinished was published", "  to do: run the same command again to continue",
    ]  # fmt: skip
    assert (project.folder / "data.partial").is_dir()
    assert not list(project.folder.glob("data.lock*"))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    project = Project(tmp_path_factory.mktemp("uncut") / "project")
    assert project.m1(*WRITERS["pretrain"]).returncode == 0
    return project.final()


def _equals(project: Project, uncut: dict[str, torch.Tensor]) -> None:
    final = project.final()
    assert final.keys() == uncut.keys()
    assert [name for name in final if not torch.equal(final[name], uncut[name])] == []


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_a_second_command_at_twenty_moments(project: Project, uncut: dict[str, torch.Tensor], name: str) -> None:
    """Moments of the whole life of a run, its start and its saves among them; the run is stopped and continued meanwhile."""
    rng, process, tried = random.Random(name), project.start_and_hold(), 0
    arguments, code = (WRITERS[name], 8) if name in WRITERS else READERS[name]
    numbers = itertools.count(6)
    while tried < 20:
        if not project.is_at_work(process):
            assert process.wait(60) in (0, 75, -signal.SIGTERM), process.communicate()
            if project.events("RunStopped")[-1]["exit_code"] == 0:
                _equals(project, uncut)
                project.next_run()
            process = project.start_and_hold()
        time.sleep(rng.uniform(0.0, 0.5))
        if name == "prepare-data":  # something new each time, or data prepared between two runs is up to date
            arguments = [*WRITERS[name], "--set", f"data.verify_docs={next(numbers)}"]
        done = project.m1(*arguments)
        if project.is_at_work(process):  # otherwise it is not known whether they met
            exported = (
                name == "export"
                and done.returncode == 0
                and (project.run_dir / "checkpoints" / "step_00000064").exists()
            )
            assert done.returncode == code or exported, done.stdout + done.stderr
            tried += 1
            if rng.random() < 0.2:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert project.m1(*WRITERS["pretrain"]).returncode == 0
    _equals(project, uncut)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_two_starts_at_the_same_time(project: Project, uncut: dict[str, torch.Tensor]) -> None:
    """One trains; the other one is refused, or was so slow to start that it finds everything done."""
    rng, refused = random.Random(4), 0
    for _ in range(10):
        names = rng.sample(["pretrain", "two ranks"], 2) if rng.random() < 0.5 else ["pretrain", "pretrain"]
        processes = []
        for name in names:
            processes.append(project.start(*WRITERS[name]))
            time.sleep(rng.choice([0.0, rng.uniform(0.0, 5.0)]))
        codes = sorted(process.wait(300) for process in processes)
        assert codes in ([0, 8], [0, 0]), [process.communicate() for process in processes]
        refused += codes[-1] == 8
        expected = ["RunStarted", "RunStopped"] * codes.count(0)
        assert [event["event"] for event in project.events("RunStarted", "RunStopped")] == expected
        if "two ranks" not in names:  # which has another order of summation
            _equals(project, uncut)
        assert project.steps() == list(range(64))
        project.next_run()
    assert refused > 0


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["SIGHUP", "closed stdout", "full stdout"])
def test_a_terminal_that_is_gone_at_five_moments(
    project: Project, uncut: dict[str, torch.Tensor], how: str, tmp_path: Path
) -> None:
    rng = random.Random(how)
    with small_disk(tmp_path / "small") if how == "full stdout" else nullcontext() as disk:
        for moment in range(5):
            process = project.start(redirect=f"> {disk}/stdout" if disk else "")
            project.wait_for_step(rng.randrange(12 * moment, 12 * moment + 12), process)
            if disk:
                fill(disk / "filler")
                assert process.wait(120) == 0, "it goes on without its terminal"
                (disk / "filler").unlink()
            elif how == "closed stdout":
                assert process.stdout is not None
                process.stdout.close()
                assert process.wait(120) == 0, "it goes on without its reader"
            else:
                process.send_signal(signal.SIGHUP)
                assert process.wait(60) == 75
                assert project.m1(*WRITERS["pretrain"]).returncode == 0
            _equals(project, uncut)
            project.next_run()
