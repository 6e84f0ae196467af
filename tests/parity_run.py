"""Runs ``distributed/parity_worker.py`` on several gloo processes: fresh ones, or the pool's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from resident_ranks import POOL, free_port

WORKER = Path(__file__).parent / "distributed" / "parity_worker.py"


@cache
def run(world: int, job: str) -> dict[str, Any]:
    """Run the worker on ``world`` fresh gloo processes and return what the last rank recorded."""
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


@cache
def run_pooled(world: int, job: str) -> list[dict[str, Any]]:
    """Run the job on processes that ran others before; what each rank recorded."""
    return POOL.run(world, "parity_worker:train", json.loads(job))
