"""Run a function on several ranks: on processes that stay for a pytest worker's whole run, or on fresh ones.

``run_on_ranks(2, "distributed.parity_worker:train", job)`` calls ``train(job)`` on two gloo ranks and returns what each returned.
Resident ranks pay their imports once; ``fresh=True`` is for functions that must begin or end with a process of their own.
This file is also the program of a rank; modules below ``tests`` are importable there.
"""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pytest

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 240.0


class Rank:
    """One process, idle between jobs; on "cuda" the GPU of its number is its own."""

    def __init__(self, number: int, device: Literal["cpu", "cuda"]) -> None:
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
               "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONSAFEPATH": "1",
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
        """Send a request and wait for its answer, ``{"value": ...}`` or ``{"error": text}``."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"the process ended: {self.printed()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def printed(self) -> str:
        """The end of what the process printed."""
        self.log.seek(0)
        return self.log.read()[-3000:]

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


class Pool:
    """Resident ranks, as many as any job has needed so far; those of ``Pool("cuda")`` have a GPU each and meet over NCCL."""

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self.ranks: dict[int, Rank] = {}
        self.device = device

    def run(
        self, world: int, target: str, job: dict[str, Any], *, first: int = 0, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """Return what ``module:function`` returned on each of ``world`` ranks; a failure of any rank ends them all.

        Args:
            job: the function's only argument; plain values that JSON can hold, as are the results.
            first: the process that is rank 0. Threads may run jobs at the same time on processes that are not the same.
            timeout_s: seconds until a rank that has not answered counts as failed.

        Raises:
            AssertionError: a rank failed, or did not answer in time.
        """
        from torch.distributed import TCPStore

        numbers = range(first, first + world)
        for number in numbers:
            if number not in self.ranks:
                self.ranks[number] = Rank(number, self.device)
        ranks = [self.ranks[number] for number in numbers]
        # The store is here, as under torchrun: a port that is free now may be taken when the ranks get to it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        request = {"world": world, "port": store.port, "target": target, "job": job, "timeout_s": timeout_s}
        with ThreadPoolExecutor(world) as threads:
            asked = {threads.submit(rank.ask, {**request, "rank": n}): n for n, rank in enumerate(ranks)}
            answers: dict[int, Any] = {}
            try:
                # In the order of the answers: over NCCL the others wait for a rank that failed, and never hear of it.
                for future in as_completed(asked, timeout_s):
                    answer = future.result()
                    if "error" in answer:
                        raise AssertionError(f"rank {asked[future]}: {answer['error']}")
                    answers[asked[future]] = answer["value"]
            except TimeoutError as error:
                silent = [f"rank {n}: {rank.printed()}" for n, rank in enumerate(ranks) if n not in answers]
                raise AssertionError("\n".join(["no answer in time", *silent])) from error
            finally:
                if len(answers) < world:
                    self.end(numbers)  # the others may wait for it
        return [answers[n] for n in range(world)]

    def end(self, numbers: Iterable[int] | None = None) -> None:
        """End these ranks, or all."""
        for number in list(self.ranks if numbers is None else numbers):
            self.ranks.pop(number).end()


_RESIDENT = Pool()
atexit.register(_RESIDENT.end)


def run_on_ranks(
    world: int, target: str, job: dict[str, Any], *, fresh: bool = False, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """Return what ``module:function`` returned for ``job`` on each of ``world`` gloo ranks (``Pool.run``).

    Args:
        fresh: use new processes and end them afterwards; otherwise the resident ones, which ran other jobs before.
    """
    if not fresh:
        return _RESIDENT.run(world, target, job, timeout_s=timeout_s)
    pool = Pool()
    try:
        return pool.run(world, target, job, timeout_s=timeout_s)
    finally:
        pool.end()


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
