"""Over NCCL every layout trains as one GPU does; saving beside training, host memory and stop requests work there too.

``pytest -s -m gpu tests/distributed/test_nccl_parity.py`` prints what was measured; four GPUs run all of it. The same on
gloo processes, slowly: ``M1_PARITY_DEVICE=cpu``. Cases are begun together, on as many GPUs as each needs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from typing import Any

import pytest
import torch
from support.layouts import LAYOUTS, OVERLAP, relative, rows_together, worst
from support.ranks import Pool
from support.tiny_run import make_run

from m1_stages.checkpoint import CheckpointStore, Committed

ON_CPU = os.environ.get("M1_PARITY_DEVICE") == "cpu"
PLACES = 4 if ON_CPU else torch.cuda.device_count()
TIMEOUT_S = 240.0 if ON_CPU else 120.0
STEPS = 12
SHAPE = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "num_kv_heads": 4, "rotary_dim": 16, "num_experts": 8}
"""The kernels of a GPU begin at heads of 16; four ranks share heads, keys and experts."""
SLOTS = 4 * 64 * 2
"""Of a step: rows, tokens, experts of a token."""
LOSS_BOUND, NORM_BOUND = 1e-6, 1e-5
"""Relative, as on CPUs. Matrix products are fp32 throughout (torch leaves TF32 off, and so do we; the attention kernels split
theirs into three TF32 ones), but sums are in another order on every layout. On four H100: 1.6e-7, 1.2e-7, of a layer 7.5e-7."""
MOVED = 8
"""Slots of the whole run that may go to another expert: of two that are equal but for rounding either may be chosen."""

WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (2, LAYOUTS[name]) for name in ("DP2", "TP2", "EP2", "PP2", "PP2 VPP2", "CP2")},
    **{name: (4, LAYOUTS[name]) for name in ("CP4", "TP2 CP2", "TP2 PP2", "PP2 EP2")},
    "DP4 distributed optimizer, overlap": (4, OVERLAP),
    "TP4": (4, {"tensor": 4}),
    "EP4": (4, {"expert": 4}),
    "PP4": (4, {"pipeline": 4, "micro_batch": 1}),
}
DP2 = ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
SAVE_EVERY, RUN_STEPS, STOPPED_STEPS = 4, 16, 128
Steps = dict[int, tuple[float, float]]
"""Loss and gradient norm by global step."""

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def needs(ranks: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(ranks > PLACES, reason=f"{ranks} GPUs are needed, {PLACES} are here")


class Places:
    """Which processes of the pool are free: each has a GPU."""

    def __init__(self) -> None:
        self._free, self._changed = set(range(PLACES)), Condition()

    def _first(self, ranks: int) -> int:
        """The first of as many free neighbours; -1: there are none."""
        return next((n for n in range(0, PLACES, ranks) if self._free >= set(range(n, n + ranks))), -1)

    @contextmanager
    def taken(self, ranks: int) -> Iterator[int]:
        with self._changed:
            self._changed.wait_for(lambda: self._first(ranks) >= 0)
            first = self._first(ranks)
            self._free -= set(range(first, first + ranks))
        try:
            yield first
        finally:
            with self._changed:
                self._free |= set(range(first, first + ranks))
                self._changed.notify_all()


class Cases:
    """Everything that the chosen tests ask for, begun at once."""

    def __init__(self, prepared: Path) -> None:
        self._prepared, self._places = prepared, Places()
        self._pool = Pool("cpu" if ON_CPU else "cuda")
        self._threads = ThreadPoolExecutor(32)
        self._futures: dict[str, Future[Any]] = {}

    def begin(self, name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """``result(name)`` will be what ``work`` returns."""
        if name not in self._futures:
            self._futures[name] = self._threads.submit(work, *arguments, **options)

    def result(self, name: str) -> Any:
        return self._futures[name].result()

    def begin_all(self, layouts: Sequence[str], *, runs: bool) -> None:
        """Small cases first: they leave no GPU idle beside another."""
        layouts = sorted((name for name in layouts if WORLDS[name][0] <= PLACES), key=lambda name: WORLDS[name][0])
        if runs and PLACES >= 2:
            self.begin("stopped", self.stopped)
        for name in layouts:
            self.begin(alone_for(name), self.layout, 1, micro_batch=rows_alone(name))
        if runs and PLACES >= 2:
            self.begin("saved", self.saved_and_resumed)
            self.begin("away", self.in_host_memory)
        for name in layouts:
            ranks, layout = WORLDS[name]
            self.begin(name, self.layout, ranks, **layout)

    def end(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._pool.end()

    def layout(self, ranks: int, *, micro_batch: int = 0, **parallel: Any) -> list[dict[str, Any]]:
        job: dict[str, Any] = {"parallel": parallel, "steps": STEPS, "model": SHAPE}
        return self.run(
            ranks, "distributed.parity_worker:train", job | ({"micro_batch": micro_batch} if micro_batch else {})
        )

    def run(self, ranks: int, target: str, job: dict[str, Any]) -> list[dict[str, Any]]:
        with self._places.taken(ranks) as first:
            began = time.monotonic()
            found = self._pool.run(ranks, target, job, first=first, timeout_s=TIMEOUT_S)
            return [{**rank, "seconds": time.monotonic() - began} for rank in found]

    def pretrain(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        """The events of ``m1 pretrain``'s job on two ranks."""
        folder = self._prepared / name
        settings = [*DP2, f"run.dir={folder}", f"stages.32k.tokens={RUN_STEPS * 1024}", "run.async_save=on",
                    f"run.save_every_steps={SAVE_EVERY}", *overrides]  # fmt: skip
        job = {"config": str(self._prepared / "m1.toml"), "stages": ["32k"], "set": settings}
        for rank in self.run(2, "distributed.evaluate_worker:pretrained", job):
            assert rank["exit"] == 0, rank["error"]
        return events(folder)

    def saved_and_resumed(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A run that saves beside training, and one that goes on from its checkpoint of ``2 * SAVE_EVERY`` steps."""
        uncut = self.pretrain("uncut")
        name = f"checkpoints/step_{2 * SAVE_EVERY:08d}"
        shutil.copytree(self._prepared / "uncut" / name, self._prepared / "resumed" / name)
        return uncut, self.pretrain("resumed")

    def in_host_memory(self) -> list[dict[str, Any]]:
        away = ["run.recompute=always", "run.offload_activations=true"]
        return self.pretrain("away", *away, *(() if ON_CPU else ["optim.offload=true"]))

    def stopped(self) -> tuple[int, list[dict[str, Any]], Committed | None]:
        """``m1 pretrain`` on two ranks after a SIGTERM to one of them: exit code, events, newest checkpoint."""
        folder = self._prepared / "stopped"
        settings = [*DP2, f"run.dir={folder}", f"stages.32k.tokens={STOPPED_STEPS * 1024}",
                    "stages.32k.max_epochs=1000"]  # fmt: skip
        command = [sys.executable, "-m", "m1cli", "pretrain", "--stage", "32k", "--gpus", "2",
                   *(part for text in settings for part in ("--set", text))]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if ON_CPU else {})
        log = self._prepared / "stopped.log"
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=self._prepared, env=env, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while len(steps_of(events(folder))) < 3:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.02)
            os.kill(json.loads((folder / "ranks" / "rank-1.json").read_text())["pid"], signal.SIGTERM)
            code = process.wait(TIMEOUT_S)
            return code, events(folder), CheckpointStore(folder / "checkpoints").latest()
        finally:
            process.kill()
            process.wait()


def events(run_dir: Path) -> list[dict[str, Any]]:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line) for line in lines]


def steps_of(found: Sequence[dict[str, Any]]) -> Steps:
    return {e["global_step"]: (e["loss"], e["grad_norm"]) for e in found if e["event"] == "StepDone"}


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    asked = [item.name for item in request.session.items if item.path == request.path]
    folder = tmp_path_factory.mktemp("runs")
    runs = any("[" not in name for name in asked)
    if runs:
        make_run(folder)
    cases = Cases(folder)
    try:
        cases.begin_all([name for name in WORLDS if any(f"[{name}]" in item for item in asked)], runs=runs)
        yield cases
    finally:
        cases.end()


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(ranks)) for name, (ranks, _) in WORLDS.items()])
def test_layout_equals_one_gpu(cases: Cases, name: str) -> None:
    ranks, layout = WORLDS[name]
    (alone,), spread = cases.result(alone_for(name)), cases.result(name)
    assert {rank["backend"] for rank in (alone, *spread)} == {"gloo" if ON_CPU else "nccl"}
    assert ON_CPU or not any(rank["hits"] for rank in spread), "calls to CUDA were redirected"
    assert [rank["topology"]["rank"] for rank in spread] == list(range(ranks))
    if any(layout.get(axis, 1) > 1 for axis in ("tensor", "pipeline", "expert")):
        assert spread[-1]["local_parameters"] < 0.9 * alone["local_parameters"], "the model was not sharded"
    if layout.get("overlap_grad_reduce"):
        assert min(spread[0]["buckets"][0]) > 1, "there is nothing to overlap with"
    if layout.get("context", 1) > 1:
        assert spread[-1]["longest_crossing"] > 0, "no document crosses to another rank"
    assert alone["losses"][0] - alone["losses"][-1] > 0.5, "the run must learn, or equality says little"
    losses, norms, layers, aux, moved = (
        max(difference(rank, alone) for rank in spread)
        for difference in (
            lambda a, b: relative(a["losses"], b["losses"]),
            lambda a, b: relative(a["grad_norms"], b["grad_norms"]),
            lambda a, b: max(map(relative, a["layer_norms"], b["layer_norms"])),
            lambda a, b: worst(a["aux"], b["aux"]),
            lambda a, b: moved_slots(a["load"], b["load"]),
        )
    )
    print(
        f"\n{name}: loss {losses:.1e}, gradient norm {norms:.1e} (of a layer {layers:.1e}), balance loss {aux:.1e}, "
        f"moved slots {moved}, loss {alone['losses'][0]:.3f} to {alone['losses'][-1]:.3f}, {spread[0]['seconds']:.1f} s"
    )
    assert losses < LOSS_BOUND
    assert aux < LOSS_BOUND
    assert norms < NORM_BOUND
    assert layers < 10 * NORM_BOUND, "one layer's norm is smaller, and so noisier, than the whole"
    assert moved <= MOVED
    assert {tuple(rank["trained_tokens"]) for rank in spread} == {tuple(alone["trained_tokens"])}


@needs(2)
def test_a_run_goes_on_from_a_checkpoint_saved_beside_training(cases: Cases) -> None:
    uncut, resumed = cases.result("saved")
    order = [
        ("saved" if e["event"] == "CheckpointSaved" else "step", e["global_step"])
        for e in uncut
        if e["event"] in ("CheckpointSaved", "StepDone")
    ]
    for saved in range(SAVE_EVERY, RUN_STEPS, SAVE_EVERY):
        assert order.index(("saved", saved)) > order.index(("step", saved)), "training did not go on meanwhile"
    started = next(e for e in resumed if e["event"] == "StageStarted")
    assert started["step"] == 2 * SAVE_EVERY
    assert_same_steps("resumed", resumed, uncut, range(2 * SAVE_EVERY, RUN_STEPS))


@needs(2)
def test_state_and_inputs_in_host_memory_change_nothing(cases: Cases) -> None:
    (uncut, _), away = cases.result("saved"), cases.result("away")
    started = next(e for e in away if e["event"] == "StageStarted")
    assert (started["recompute"], started["offload_activations"]) == (True, True)
    assert_same_steps("host memory", away, uncut, range(RUN_STEPS))


@needs(2)
def test_one_rank_asked_to_stop_is_enough(cases: Cases) -> None:
    code, found, checkpoint = cases.result("stopped")
    assert code == 75
    done = max(steps_of(found)) + 1
    assert done < STOPPED_STEPS, "it was over before it was asked"
    assert (checkpoint.meta.global_step, checkpoint.meta.stage_final) == (done, False)
    assert (found[-1]["event"], found[-1]["exit_code"]) == ("RunStopped", 75)


def rows_alone(name: str) -> int:
    """Rows that one process takes at a time to do what the ranks of the layout do together; 0: all."""
    ranks, layout = WORLDS[name]
    return rows_together(layout, ranks)


def alone_for(name: str) -> str:
    """Name of that run."""
    return f"one GPU, {rows_alone(name) or 4} rows at a time"


def moved_slots(load: list[Any], other: list[Any]) -> int:
    """Slots of all steps and layers that went to another expert."""
    pairs = zip(torch.tensor(load).flatten().tolist(), torch.tensor(other).flatten().tolist(), strict=True)
    return round(SLOTS * sum(abs(a - b) for a, b in pairs) / 2)


def assert_same_steps(
    what: str, found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], steps: range
) -> None:
    mine, theirs = steps_of(found), steps_of(expected)
    assert sorted(mine) == list(steps)
    losses, norms = (relative([mine[s][i] for s in steps], [theirs[s][i] for s in steps]) for i in (0, 1))
    first, last = theirs[steps[0]][0], theirs[steps[-1]][0]
    print(f"\n{what}: loss {losses:.1e}, gradient norm {norms:.1e}, loss {first:.3f} to {last:.3f}")
    assert losses < LOSS_BOUND
    assert norms < NORM_BOUND
