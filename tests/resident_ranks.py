"""Rank processes that stay for a pytest worker's whole run: a job costs a process group, not the imports.

``POOL.run(2, "module:function", job)`` calls ``function(job)`` on two gloo ranks and returns what each gave. This file is
also the ranks' program; modules of ``tests/distributed`` are importable there.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

TESTS = Path(__file__).parent
TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Rank:
    """One process, idle between jobs."""

    def __init__(self, number: int) -> None:
        paths = [str(TESTS), str(TESTS / "distributed")]
        env = {**os.environ, "RANK": str(number), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
               "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
               "PYTHONPATH": os.pathsep.join(paths)}  # fmt: skip
        self.log: IO[str] = TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            return {"error": f"the process ended: {self.log.read()[-3000:]}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Pool:
    """As many ranks as any job wanted so far."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []

    def run(self, world: int, target: str, job: dict[str, Any]) -> list[Any]:
        """What ``module:function`` returned on each of ``world`` ranks; a failure of any rank ends them all."""
        from torch.distributed import TCPStore

        while len(self.ranks) < world:
            self.ranks.append(Rank(len(self.ranks)))
        # The store is here, as under torchrun: a port that is free now may be taken when the ranks get to it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        request = {"world": world, "port": store.port, "target": target, "job": job}
        with ThreadPoolExecutor(world) as threads:
            asked = [threads.submit(rank.ask, request) for rank in self.ranks[:world]]
            try:
                answers = []
                for future in asked:
                    answers.append(future.result(TIMEOUT_S))
                    if "error" in answers[-1]:
                        break
            except BaseException:
                self.end()
                raise
            if "error" in answers[-1]:
                self.end()  # the others may wait for it
                raise AssertionError(f"rank {len(answers) - 1}: {answers[-1]['error']}")
        return [answer["value"] for answer in answers]

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()
        self.ranks.clear()


POOL = Pool()
atexit.register(POOL.end)


def serve() -> None:
    """Answer a line of JSON with a line of JSON, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    for line in sys.stdin:
        request = json.loads(line)
        os.environ |= {"WORLD_SIZE": str(request["world"]), "MASTER_PORT": str(request["port"])}
        module, function = request["target"].split(":")
        try:
            answer = {"value": getattr(importlib.import_module(module), function)(request["job"])}
        except Exception:
            answer = {"error": traceback.format_exc()[-3000:]}
        gc.collect()  # the job's process groups are garbage in cycles, each with a thread that keeps waking up
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
