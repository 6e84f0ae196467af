"""Where the wall time of a process goes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from m1_stages.runtime.phase_clock import PhaseClock
from m1cli.pace import wall_time


def test_every_moment_belongs_to_one_phase() -> None:
    now = [100.0]
    clock = PhaseClock(7.0, clock=lambda: now[0])
    for phase, spent in (("build", 1.0), ("train", 2.0), ("save", 4.0), ("train", 8.0), ("train", 16.0)):
        now[0] += spent
        clock.enter(phase)
    now[0] += 32.0
    assert clock.seconds() == {"start": 8.0, "build": 2.0, "train": 4.0 + 16.0 + 32.0, "save": 8.0}
    now[0] += 64.0
    assert sum(clock.seconds().values()) == 7.0 + 63.0 + 64.0


def test_imports_count_as_the_start() -> None:
    code = "import time; time.sleep(0.6); from m1_stages.runtime.phase_clock import process_age; print(process_age())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < time.monotonic() - began + 1.1


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ({"start": 12.0, "train": 60.0, "save": 47.6, "data": 0.4}, "120 s: 50% in steps, 40% saving, 10% starting up"),
        ({"start": 3.0, "evaluate": 7.0}, "10 s: 70% evaluating, 30% starting up"),
        ({"train": 0.0}, "0 s: "),
    ],
)
def test_the_sentence(seconds: dict[str, float], told: str) -> None:
    assert wall_time(seconds) == told
