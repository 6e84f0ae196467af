"""Everything a training process sets up before its loop, and takes down after it."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from m1_stages.checkpoint import CheckpointMeta, CheckpointStore, Committed
from m1_stages.config import CHECKPOINTS, METRICS, Resolved
from m1_stages.errors import CheckpointError, ConfigError, M1Error, NumericStop
from m1_stages.events import CheckpointRejected, Event, JsonLines, RunStarted, RunStopped, Sink
from m1_stages.plan.shapes import count_parameters
from m1_stages.runtime import device as device_module
from m1_stages.runtime import parallel
from m1_stages.runtime.collectives import barrier
from m1_stages.runtime.signals import StopRequest
from m1_stages.runtime.watchdog import PATIENCE, beat, dump_stacks, moved
from m1_stages.training.checkpointer import Saver
from m1_stages.training.loop import Run
from m1_stages.training.rollback import ROLLBACKS, roll_back
from m1_stages.training.train_state import TrainState

_SHARDING = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class Session:
    """A built model and optimizer, the checkpoints of the run, and where events go."""

    def __init__(self, resolved: Resolved, run: Run, store: CheckpointStore) -> None:
        self.resolved, self.run, self.store = resolved, run, store
        self.forced_gates: list[dict[str, Any]] = []
        """Stages on the way to these weights that were started although the one before recalled too little."""
        self.saver = run.saver = Saver(
            store,
            sharded_state=lambda state: self.sharded_state(state, is_loading=False),
            meta=self.meta,
            emit=run.emit,
            background=resolved.config.run.saves_in_background(run.device.name),
            max_failed=resolved.config.run.max_failed_saves,
        )
        run.roll_back = partial(roll_back, self)

    def sharded_state(self, state: TrainState, *, is_loading: bool) -> dict[str, Any]:
        """Model, optimizer and position as ``dist_checkpointing`` takes them; every rank calls it."""
        from m1_stages.runtime.ddp import gather_parameters

        gather_parameters(self.run.chunks)
        metadata: dict[str, Any] = {**_SHARDING}  # Megatron adds the data-parallel group, which ends with the session
        model = self.run.model.sharded_state_dict(metadata=metadata)
        optimizer = self.run.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "train_state": state.as_dict()}

    def meta(self, state: TrainState, stage_final: bool) -> CheckpointMeta:
        """What a checkpoint of ``state`` says about itself."""
        return CheckpointMeta(
            stage=state.stage,
            stage_step=state.stage_step,
            global_step=state.global_step,
            stage_final=stage_final,
            config_sha256=self.resolved.sha256,
            data_fingerprint=state.data_fingerprint,
            topology=self.run.topology.sizes(),
            decay={"policy": self.resolved.config.curriculum.decay, "slopes": state.slopes},
            extra={
                "tokens_seen": state.tokens_seen,
                "model": self.model_shape(),
                "rope_base": self.run.model.rope_base,
                "forced_gates": self.forced_gates,
            },
        )

    def model_shape(self) -> dict[str, Any]:
        """The resolved model section: a checkpoint of another shape is refused by name, not by a shape error."""
        return dict(self.resolved.as_dict()["model"])

    def restore(self, candidates: Sequence[Committed]) -> tuple[Committed, TrainState] | None:
        """Load the first of ``candidates`` that verifies; None when there are none.

        Raises:
            CheckpointError: there are candidates, but none can be used.
        """
        from m1_stages.runtime.optimizer import finish_loading, make_loadable

        self.saver.settle()
        beat("build")
        for committed in candidates:
            self._refuse_other_shape(committed)
        if candidates:
            make_loadable(self.run.optimizer)
        found = self.store.load_first_verified(
            candidates, lambda: self.sharded_state(TrainState(stage=""), is_loading=True)
        )
        if found is None:
            return None
        committed, loaded = found
        self.run.model.load_state_dict(loaded["model"])
        self.run.optimizer.load_state_dict(loaded["optimizer"])
        finish_loading(self.run.optimizer)
        saved = committed.meta.extra.get("forced_gates", [])
        self.forced_gates = saved + [gate for gate in self.forced_gates if gate not in saved]  # also after a roll back
        return committed, TrainState.from_dict(loaded["train_state"])

    def _refuse_other_shape(self, committed: Committed) -> None:
        saved, now = committed.meta.extra.get("model", {}), self.model_shape()
        for key in sorted(saved.keys() | now.keys()):
            if saved.get(key) != now.get(key):
                raise CheckpointError(
                    f"the checkpoint has model.{key} = {saved.get(key)}, the configuration says {now.get(key)}",
                    where=str(committed.path),
                    fix=f"set model.{key} back, use another run.dir, or start over with --fresh",
                )


@contextmanager
def open_session(resolved: Resolved, sinks: Sequence[Sink], *, rope_base: float, fresh: bool) -> Iterator[Session]:
    """Start the process group, build model and optimizer, catch signals; report how it ended."""
    config = resolved.config
    device = device_module.use(config.run.device, local_rank=parallel.local_rank())
    topology = parallel.start(config.parallel, device=device, seed=config.run.seed)
    torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // topology.local_world))
    from m1_stages.model import build_model
    from m1_stages.runtime.ddp import wrap_ddp
    from m1_stages.runtime.optimizer import build_optimizer

    run_dir = resolved.run_dir
    if topology.rank == 0:
        _prepare_run_dir(run_dir, fresh=fresh)
    barrier()
    emit, close = _emitter(run_dir, sinks, rank=topology.rank)
    stop = StopRequest()
    try:
        with stop:
            model = build_model(
                config.model,
                parallel=config.parallel,
                precision=config.run.precision,
                rope_base=rope_base,
                device=device.name,
                seed=config.run.seed,
            )
            wrapped = wrap_ddp(model, config.parallel)
            optimizer = build_optimizer(
                wrapped,
                config.optim,
                bf16=config.run.precision == "bf16",
                distributed=config.parallel.distributed_optimizer,
            )
            run = Run(
                device=device,
                topology=topology,
                model=model,
                chunks=wrapped,
                optimizer=optimizer,
                emit=emit,
                save_every_steps=config.run.save_every_steps,
                stop=stop,
                check_replicas_every=config.run.check_replicas_every,
                guard=config.guard,
                max_grad_norm=config.optim.grad_clip,
                roll_back=lambda plan, rows, state, verdict: state,
                guess_loss=math.log(config.model.vocab_size),
            )
            store = CheckpointStore(
                run_dir / CHECKPOINTS,
                keep_last=config.run.keep_last,
                deadline_s=PATIENCE * config.parallel.timeout_s,
                on_waiting=moved,
                on_stuck=dump_stacks,
                on_rejected=lambda path, reason, moved: emit(
                    CheckpointRejected(path=str(path), reason=reason, quarantined_as=str(moved))
                ),
            )
            store.sweep()
            emit(_run_started(resolved, device, topology, store))
            session = Session(resolved, run, store)
            try:
                yield session
            except NumericStop:  # on all ranks at the same step; what is being written is from before it
                with suppress(CheckpointError):
                    session.saver.settle()
                raise
            emit(RunStopped(reason="done", exit_code=0))
    except M1Error as error:
        emit(RunStopped(reason=str(error), exit_code=error.exit_code))
        raise
    finally:
        close()
        parallel.stop()


def _prepare_run_dir(run_dir: Path, *, fresh: bool) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    if not fresh:
        return
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in (CHECKPOINTS, METRICS, ROLLBACKS):
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.before-{stamp}")


def _emitter(run_dir: Path, sinks: Sequence[Sink], *, rank: int) -> tuple[Sink, Any]:
    """Rank 0 reports; the other ranks stay silent."""
    if rank != 0:
        return (lambda event: None), (lambda: None)
    lines = JsonLines(run_dir / METRICS)

    def emit(event: Event) -> None:
        lines(event)
        for sink in sinks:
            sink(event)

    return emit, lines.close


def _run_started(resolved: Resolved, device: Any, topology: parallel.Topology, store: CheckpointStore) -> RunStarted:
    counts = count_parameters(resolved.config.model)
    latest = store.latest()
    return RunStarted(
        command=" ".join(sys.argv),
        run_dir=str(resolved.run_dir),
        config_sha256=resolved.sha256,
        preset=resolved.config.preset,
        device=device.name,
        precision=resolved.config.run.precision,
        world_size=topology.world_size,
        topology=topology.sizes(),
        parameters=counts.total,
        active_parameters=counts.active,
        versions={name: version(name) for name in ("m1cli", "torch", "megatron-core")},
        resumed_from=str(latest.path) if latest else "",
    )


def with_vocab(resolved: Resolved, vocab_size: int) -> Resolved:
    """Fill ``model.vocab_size`` from the tokenizer of the prepared data.

    Raises:
        ConfigError: the configured vocabulary is smaller than the tokenizer's.
    """
    configured = resolved.config.model.vocab_size
    if configured and configured < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {configured}, but the tokenizer of the prepared data has {vocab_size} ids",
            where=f"{resolved.origins.get('model.vocab_size', '')}, key model.vocab_size",
            fix=f"set model.vocab_size = {vocab_size}, or 0 to take it from the data",
        )
    model = dataclasses.replace(resolved.config.model, vocab_size=configured or vocab_size)
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, model=model))
