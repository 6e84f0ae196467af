"""One rank of a short run on four rows, with a fault on one of the ranks: what each rank saw and decided.

``fault``: "nan loss", "nan gradient", "flipped bit", "slow" or "stop asked", on rank ``rank`` at step ``step``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distributed.parity_worker import MODEL, ROWS, SEQ_LEN, build, packed

from m1_data.sampling.loader import PackedBatch
from m1_stages.config import GuardConfig, ParallelConfig
from m1_stages.curriculum import LrSchedule, StagePlan
from m1_stages.decay import released_slopes
from m1_stages.errors import M1Error
from m1_stages.events import Event
from m1_stages.runtime import device, parallel
from m1_stages.training.train_state import TrainState


class Rows:
    """``slow_s``: seconds that every batch takes longer."""

    fingerprint = "rows"

    def __init__(self, steps: int, slow_s: float) -> None:
        self.steps, self.slow_s = steps, slow_s

    def __len__(self) -> int:
        return self.steps * ROWS

    def batch(self, row_ids: list[int]) -> PackedBatch:
        time.sleep(self.slow_s)
        return packed(row_ids)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """``parallel``, ``steps``, ``fault``, ``rank``, ``step``; ``guard`` and ``run`` change the configuration."""
    torch.set_num_threads(1)
    dev = device.use("cpu")
    topology = parallel.start(ParallelConfig(**job["parallel"]), device=dev, seed=1)
    try:
        return _train(job, dev, topology)
    finally:
        parallel.stop()


def _train(job: dict[str, Any], dev: Any, topology: parallel.Topology) -> dict[str, Any]:
    from m1_stages.runtime.signals import StopRequest
    from m1_stages.training.loop import train_stage
    from m1_stages.training.objective import NextTokenCrossEntropy
    from m1_stages.training.run import Run

    model, chunks, optimizer = build(ParallelConfig(**job["parallel"]), seed=5)
    slopes, steps = released_slopes(MODEL.num_layers, MODEL.num_heads), job["steps"]
    plan = StagePlan(
        stage="32k", starts_from=None, context_tokens=SEQ_LEN, seq_len=SEQ_LEN, rope_base=1e4, global_batch_rows=ROWS,
        micro_batch_rows=job.get("micro_batch", ROWS), num_steps=steps, lr=LrSchedule(peak=3e-3, final=3e-3, num_steps=steps),
        ramp_length=1, slopes_old=slopes, slopes_new=slopes, config_section="stages.32k", title="stage 32k",
    )  # fmt: skip
    mine = topology.rank == job.get("rank", -1)
    events: list[Event] = []
    run = Run(
        run_dir=Path(), device=dev, topology=topology, model=model, trainable=chunks, optimizer=optimizer,
        checkpointer=mock.Mock(save_now=lambda state: ""), emit=events.append,
        save_every_steps=10**6, stop=StopRequest(),
        guard=dataclasses.replace(GuardConfig(), **job.get("guard", {})), max_grad_norm=1.0,
        **{"check_replicas_every": 0} | job.get("run", {}),
    )  # fmt: skip
    fault = job.get("fault", "") if mine else ""
    state, error = TrainState(stage="32k", slopes=slopes), {}
    if fault == "stop asked":
        model.before_each_forward(lambda: setattr(run.stop, "received", "SIGTERM" * (state.global_step >= job["step"])))
    with _faulty(fault, job.get("step", 0), chunks, state):
        try:
            train_stage(run, plan, Rows(steps, 0.1 if fault == "slow" else 0.0), state, NextTokenCrossEntropy())
        except M1Error as problem:
            error = {"what": problem.what, "where": problem.where, "code": problem.exit_code}
    return {
        "events": [{"event": type(event).__name__, **dataclasses.asdict(event)} for event in events],
        "error": error,
        "step": state.global_step,
        "parameters": _hash(chunks),
        "dp_rank": topology.dp_rank,
    }


@contextmanager
def _faulty(fault: str, at: int, chunks: list[Any], state: TrainState) -> Iterator[None]:
    from m1_stages.training import update
    from m1_stages.training.objective import NextTokenCrossEntropy

    original_loss, original_check = NextTokenCrossEntropy.loss, update.check_replicas

    def loss(self: NextTokenCrossEntropy, batch: PackedBatch, output: Any) -> Any:
        return original_loss(self, batch, output * (float("nan") if state.global_step == at else 1.0))

    def spoiled(finalize: Callable[..., None], chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        if state.global_step == at:
            next(iter(chunks[0].parameters())).main_grad.view(-1)[3] = float("nan")
        finalize(chunks, *args, **kwargs)

    def check(chunks: list[Any], *, step: int) -> None:
        if step == at:
            with torch.no_grad():
                weight = chunks[0].module.decoder.layers[2].mlp.router.weight
                weight.view(-1).view(torch.int32)[5] ^= 1  # the last bit of a mantissa
        original_check(chunks, step=step)

    if fault == "nan loss":
        with mock.patch.object(NextTokenCrossEntropy, "loss", loss):
            yield
    elif fault == "nan gradient":
        config = chunks[0].config
        config.finalize_model_grads_func = partial(spoiled, config.finalize_model_grads_func)
        yield
    elif fault == "flipped bit":
        with mock.patch.object(update, "check_replicas", check):
            yield
    else:
        yield


def _hash(chunks: list[Any]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        for param in chunk.module.parameters():
            digest.update(param.detach().numpy().tobytes())
    return digest.hexdigest()
