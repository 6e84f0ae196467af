"""Processes that stay for many jobs, each job with a process group of its own: imports are paid once a rank.

The test calls ``run_pool``; the worker, ``python worker.py PLAN.jsonl``, loops over ``my_jobs``. Jobs run one after the
other; a rank takes part in those whose ``world`` is larger than its number.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

RANKS = 4


def run_pool(worker: Path, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run ``jobs`` on ``RANKS`` gloo processes; fails as soon as one of them does."""
    # The stores are here, as under torchrun: a port that is only free when the plan is made is taken when its turn comes.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    plan = folder / "plan.jsonl"
    plan.write_text(
        "".join(json.dumps({**job, "port": store.port}) + "\n" for job, store in zip(jobs, stores, strict=True))
    )
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).parent)}  # fmt: skip
    logs = [folder / f"rank-{rank}.log" for rank in range(RANKS)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, str(worker), str(plan)]
                ranks.append(subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdout=file, stderr=file))
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.05)  # the others of a failed rank would wait for it
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0] * RANKS, "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)


def filled_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that ``fill`` fills for all pytest workers of this test run: the first does, the others wait."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder


def my_jobs(plan: Path) -> Iterator[dict[str, Any]]:
    """This rank's jobs, each with the environment its process group starts from."""
    for line in plan.read_text().splitlines():
        job = json.loads(line)
        if int(os.environ["RANK"]) < job["world"]:
            os.environ |= {"WORLD_SIZE": str(job["world"]), "MASTER_PORT": str(job["port"])}
            yield job
            gc.collect()  # the job's process groups are garbage in cycles, each with a thread that keeps waking up
