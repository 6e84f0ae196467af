"""SIGKILL to the real command at moments of every kind: five stages, their evaluations, and what lies between them.

Each campaign goes on until so many processes were killed as it promises. Number 64 of docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.test_killed_runs import small
from support.pretraining import events_of
from support.tiny_checkpoint import tensors_of

STAGES = ["32k", "128k", "256k", "512k", "1m"]
EVALUATE = "[evaluate]\nsamples = 4\ndocuments = 4\ngate = 0.0\n"
Events = list[dict[str, Any]]


class Command:
    """``m1 pretrain --stage all`` in one project, with a run directory of its own for each uninterrupted chain of kills.

    The run that is not killed saves in the foreground, those that are killed in the background, final checkpoints too.
    """

    def __init__(self, folder: Path) -> None:
        self.config = small(folder)
        text = self.config.read_text().replace("[evaluate]\nenabled = false\n", EVALUATE)
        self.config.write_text(text.replace("keep_last", "# keep_last"))
        self.run_dir = folder / "uncut"
        began = time.monotonic()
        process = self.start()
        while not self.events():
            time.sleep(0.01)
        self.starts_s = time.monotonic() - began
        assert process.wait(300) == 0
        self.works_s = time.monotonic() - began - self.starts_s
        self.expected = self.outcome()
        self.chains = 0

    def start(self) -> subprocess.Popen[bytes]:
        saves = "off" if self.run_dir.name == "uncut" else "on"
        settings = ["--set", f"run.dir={self.run_dir}", "--set", f"run.async_save={saves}"]
        arguments = ["pretrain", "--config", str(self.config), "--stage", "all", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "m1cli", *arguments], env=environment, stdout=subprocess.DEVNULL)

    def next_chain(self) -> None:
        self.chains += 1
        self.run_dir = self.run_dir.with_name(f"run-{self.chains}")

    def events(self) -> Events:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def outcome(self) -> tuple[dict[str, torch.Tensor], dict[tuple[str, int], tuple[float, float]], list[Any]]:
        """Final weights, loss and gradient norm of every step, and what the evaluations measured."""
        path = self.run_dir / "metrics.jsonl"
        steps = {(e["stage"], e["step"]): (e["loss"], e["grad_norm"]) for e in events_of(path, "StepDone")}
        assert events_of(path, "SaveFailed", "CheckpointRejected", "StepExcluded") == []
        results = [json.loads((self.run_dir / "evaluation" / f"{stage}.json").read_text()) for stage in STAGES]
        measured = [[result["needles"], result["positions"]] for result in results]
        return tensors_of(sorted((self.run_dir / "checkpoints").glob("step_????????"))[-1]), steps, measured

    def compare(self) -> None:
        weights, steps, measured = self.outcome()
        expected_weights, expected_steps, expected_measured = self.expected
        assert weights.keys() == expected_weights.keys()
        assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
        assert steps == expected_steps
        assert measured == expected_measured

    def killed(self, times: int, moment: Callable[[subprocess.Popen[bytes]], bool]) -> Counter[str]:
        """Kill ``times`` processes, each when ``moment`` returns True; returns what their runs had reported last."""
        found: Counter[str] = Counter()
        self.next_chain()
        while sum(found.values()) < times:
            process = self.start()
            if moment(process):
                process.kill()
            if process.wait(300) == -9:
                events = self.events()
                found[events[-1]["event"] if events else "nothing"] += 1
            else:
                assert process.returncode == 0
                self.compare()
                self.next_chain()
        process = self.start()
        assert process.wait(300) == 0
        self.compare()
        return found


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("killed") / "data")


def _after(command: Command, event: str, stages: list[str], delay_s: Callable[[], float]) -> Any:
    """A moment that long after ``event`` of one of ``stages`` was reported by the process, if it reports it."""

    def moment(process: subprocess.Popen[bytes]) -> bool:
        seen = len(command.events())
        while process.poll() is None:
            if any(e["event"] == event and e["stage"] in stages for e in command.events()[seen:]):
                time.sleep(delay_s())
                return True
            time.sleep(0.001)
        return False

    return moment


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments(command: Command) -> None:
    """From the start of the process on: imports, the lock, loading, steps, saves, evaluations."""
    rng = random.Random(11)

    def moment(process: subprocess.Popen[bytes]) -> bool:
        if rng.random() < 0.2:  # while it starts
            time.sleep(rng.uniform(0.2, command.starts_s))
        else:
            seen = len(command.events())
            while process.poll() is None and len(command.events()) == seen:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, command.works_s))
        return process.poll() is None

    found = command.killed(50, moment)
    print(f"killed after: {dict(found)}")
    assert sum(found[event] for event in ("nothing", "RunStopped")) < 25, "half of them were still starting"
    assert len(found) >= 4, "the kills fell on few kinds of moments only"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_ten_kills_in_evaluation(command: Command) -> None:
    rng = random.Random(12)
    lasts_s = [e["seconds"] for e in events_of(command.config.parent / "uncut" / "metrics.jsonl", "StageEvaluated")]
    found = command.killed(10, _after(command, "StageDrawn", STAGES, lambda: rng.uniform(0.0, 0.8) * min(lasts_s)))
    print(f"evaluations last {lasts_s} s; killed after: {dict(found)}")
    assert found["StageDrawn"] >= 5, "most of the evaluations were over"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_five_kills_between_stages(command: Command) -> None:
    """Right after a stage was evaluated, and right after the next one was announced."""
    rng = random.Random(13)
    found = command.killed(3, _after(command, "StageEvaluated", STAGES[:-1], lambda: 0.0))
    found += command.killed(2, _after(command, "StageStarted", STAGES[1:], lambda: rng.uniform(0.0, 0.01)))
    print(f"killed after: {dict(found)}")
    assert found["StageEvaluated"] + found["StageStarted"] >= 4
