"""Rank processes that stay for a pytest worker's whole run: a job costs a process group, not the imports.

``POOL.run(2, "module:function", job)`` calls ``function(job)`` on two gloo ranks and returns what each gave; those of
``Pool("cuda")`` have a GPU each and meet over NCCL. This file is also the ranks' program; modules of ``tests/distributed`` are
importable there.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

TESTS = Path(__file__).parent
TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Rank:
    """One process, idle between jobs; on "cuda" the GPU of its number is its own."""

    def __init__(self, number: int, device: Literal["cpu", "cuda"]) -> None:
        paths = [str(TESTS), str(TESTS / "distributed"), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
               "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
               "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # fmt: skip
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
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
            return {"error": f"the process ended: {self.said()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def said(self) -> str:
        """The end of what it printed."""
        self.log.seek(0)
        return self.log.read()[-3000:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Pool:
    """As many ranks as any job wanted so far."""

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu", timeout_s: float = TIMEOUT_S) -> None:
        self.ranks: dict[int, Rank] = {}
        self.device, self.timeout_s = device, timeout_s

    def run(self, world: int, target: str, job: dict[str, Any], *, first: int = 0) -> list[Any]:
        """What ``module:function`` returned on each of ``world`` ranks; a failure of any rank ends them all.

        Args:
            first: the process that is rank 0. Threads may run jobs at the same time on processes that are not the same.
        """
        from torch.distributed import TCPStore

        numbers = range(first, first + world)
        for number in numbers:
            if number not in self.ranks:
                self.ranks[number] = Rank(number, self.device)
        ranks = [self.ranks[number] for number in numbers]
        # The store is here, as under torchrun: a port that is free now may be taken when the ranks get to it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        request = {"world": world, "port": store.port, "target": target, "job": job, "timeout_s": self.timeout_s}
        with ThreadPoolExecutor(world) as threads:
            asked = {threads.submit(rank.ask, {**request, "rank": n}): n for n, rank in enumerate(ranks)}
            answers: dict[int, Any] = {}
            try:
                # In the order of the answers: over NCCL the others wait for a rank that failed, and never hear of it.
                for future in as_completed(asked, self.timeout_s):
                    answer = future.result()
                    if "error" in answer:
                        raise AssertionError(f"rank {asked[future]}: {answer['error']}")
                    answers[asked[future]] = answer["value"]
            except TimeoutError as error:
                silent = [f"rank {n}: {rank.said()}" for n, rank in enumerate(ranks) if n not in answers]
                raise AssertionError("\n".join(["no answer in time", *silent])) from error
            finally:
                if len(answers) < world:
                    self.end(numbers)  # the others may wait for it
        return [answers[n] for n in range(world)]

    def end(self, numbers: Iterable[int] | None = None) -> None:
        """These ranks, or all."""
        for number in list(self.ranks if numbers is None else numbers):
            self.ranks.pop(number).end()


POOL = Pool()
atexit.register(POOL.end)


def serve() -> None:
    """Answer a line of JSON with a line of JSON, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    for line in sys.stdin:
        request = json.loads(line)
        os.environ |= {"RANK": str(request["rank"]), "WORLD_SIZE": str(request["world"]),
                       "MASTER_PORT": str(request["port"])}  # fmt: skip
        faulthandler.dump_traceback_later(0.9 * request["timeout_s"])  # a hang shows in the log
        module, function = request["target"].split(":")
        try:
            answer = {"value": getattr(importlib.import_module(module), function)(request["job"])}
        except Exception:
            answer = {"error": traceback.format_exc()[-3000:]}
        faulthandler.cancel_dump_traceback_later()
        gc.collect()  # the job's process groups are garbage in cycles, each with a thread that keeps waking up
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
