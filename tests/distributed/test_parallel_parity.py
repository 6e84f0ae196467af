"""Every layout trains like one process: losses, gradient norms, balance loss and expert load over 20 steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")
STEPS = 20


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@cache
def run(world: int, job: str) -> dict[str, Any]:
    """Run the worker on ``world`` gloo processes and return what the last rank recorded."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
               "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}  # fmt: skip
        ranks = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(out), job],
                env={**env, "RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, errors[-1][-3000:]
        record: dict[str, Any] = json.loads(out.read_text())
        return record


def record(world: int, *, steps: int = STEPS, mutation: str = "", **parallel: Any) -> dict[str, Any]:
    return run(world, json.dumps({"parallel": parallel, "steps": steps, "mutation": mutation}, sort_keys=True))


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "EP2": {"expert": 2},
    "DP2": {},
    "PP2": {"pipeline": 2},
    "DP2 distributed optimizer": {"distributed_optimizer": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str) -> None:
    alone, spread = record(1), record(2, **LAYOUTS[name])
    assert spread["topology"]["world"] == 2
    if "DP2" not in name:
        assert spread["local_parameters"] < 0.9 * alone["local_parameters"], "the model was not sharded"
    assert alone["losses"][0] - alone["losses"][-1] > 1.0, "the run must learn, or equality says little"
    assert worst(spread["losses"], alone["losses"]) < 1e-6
    assert worst(spread["aux"], alone["aux"]) < 1e-6
    relative = [abs(a - b) / b for a, b in zip(spread["grad_norms"], alone["grad_norms"], strict=True)]
    assert max(relative) < 1e-5
    for a, b in zip(spread["layer_norms"], alone["layer_norms"], strict=True):
        if a:
            assert worst(a, b) < 1e-5
    assert spread["load"] == alone["load"]


@pytest.mark.parametrize(
    ("layout", "mutation"),
    [
        ("TP2", "rank 1 takes rank 0's heads"),
        ("PP2", "slopes of the neighbour layer"),
        ("TP2", "no reduction in the sharded norm, forward"),
        ("TP2", "no reduction in the sharded norm, backward"),
        ("TP2", "norm weight not sequence parallel"),
        ("TP2", "router weight not sequence parallel"),
        ("TP2", "expert gradients in the dense groups"),
        ("TP2", "sharded weights not marked"),
        ("TP2 ETP2", "experts missing from the gradient norm"),
    ],
)
def test_parity_fails_when_the_code_is_wrong(layout: str, mutation: str) -> None:
    alone = record(1)
    wrong = record(2, mutation=mutation, **LAYOUTS[layout])
    losses = worst(wrong["losses"], alone["losses"])
    norms = max(abs(a - b) / b for a, b in zip(wrong["grad_norms"], alone["grad_norms"], strict=True))
    assert losses > 1e-5 or norms > 1e-4, f"{mutation}: losses differ by {losses:.1e}, gradient norms by {norms:.1e}"
