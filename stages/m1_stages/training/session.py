"""Sets up what a training process needs before its loop, and takes it down afterwards."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from m1_data.storage.lock import writing
from m1_stages.checkpoint import CheckpointStore
from m1_stages.checkpoint.host_copy import HostCopy
from m1_stages.config import Config, Resolved
from m1_stages.config.lora import LoraConfig
from m1_stages.errors import CheckpointError, ConfigError, EnvironmentProblem, InUse, M1Error, NumericStop
from m1_stages.events import CheckpointRejected, Event, EventsDelayed, RunStarted, RunStopped, Sink
from m1_stages.metrics_file import JsonLines
from m1_stages.plan.hardware import GIB
from m1_stages.plan.layout import layout_from_sizes
from m1_stages.plan.memory.host import SaveMode, available_host_gib, choose_save_mode, run_host_memory
from m1_stages.plan.memory.policy import memory_policy_of
from m1_stages.plan.shapes import count_parameters
from m1_stages.run_dir import CHECKPOINTS, LOCK, METRICS, ROLLBACKS, refuse_foreign_run_dir
from m1_stages.runtime import device as device_module
from m1_stages.runtime import parallel
from m1_stages.runtime.collectives import agree_min, barrier
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.optimizer import Optimizer
from m1_stages.runtime.signals import StopRequest
from m1_stages.runtime.watchdog import SLOW_PHASE_FACTOR, dump_stacks, report_progress, wall_seconds
from m1_stages.training.checkpointer import Checkpointer
from m1_stages.training.recompute_choice import is_out_of_memory
from m1_stages.training.run import Run

RequireHeld = Callable[[], None]
"""Raises ``InUse`` when the lock of the run directory was lost, so that nothing is written there any more."""


@contextmanager
def open_session(
    resolved: Resolved,
    sinks: Sequence[Sink],
    *,
    rope_base: float,
    fresh: bool,
    data: Sequence[str] = (),
    lora: LoraConfig | None = None,
) -> Iterator[Run]:
    """Lock the run directory, start the process group, build model, optimizer and checkpointer, catch signals.

    Nothing is written before the lock is held; how the run ended is reported.

    Args:
        sinks: where rank 0 sends its events, besides ``metrics.jsonl``.
        rope_base: RoPE base of the first stage.
        fresh: rename all checkpoints, the metrics and the roll backs, and start over.
        data: what to report of the prepared data.
        lora: train these adapters, and no other weights.

    Raises:
        InUse: another command writes to the run directory.
        M1Error: what the body raises; it is reported before it passes through.
    """
    device = device_module.use(resolved.config.run.device, local_rank=parallel.local_rank())
    with (
        _locked(resolved.run_dir, is_writer=parallel.global_rank() == 0) as require_held,
        _locked_session(resolved, device, sinks, require_held, data, lora, rope_base=rope_base, fresh=fresh) as run,
    ):
        yield run


@contextmanager
def _locked(run_dir: Path, *, is_writer: bool) -> Iterator[RequireHeld]:
    """Hold the lock of the run directory on the rank that writes there; the other ranks belong to the same run."""
    if not is_writer:
        yield lambda: None
        return
    refuse_foreign_run_dir(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with writing(run_dir / LOCK, f"the run directory {run_dir}") as lock:
        yield lock.require_held


@contextmanager
def _locked_session(
    resolved: Resolved,
    device: device_module.Device,
    sinks: Sequence[Sink],
    require_held: RequireHeld,
    data: Sequence[str],
    lora: LoraConfig | None,
    *,
    rope_base: float,
    fresh: bool,
) -> Iterator[Run]:
    config = resolved.config
    topology = parallel.start(config.parallel, device=device, seed=config.run.seed)
    torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // topology.local_world))
    if topology.rank == 0 and fresh:
        put_aside(resolved.run_dir)
    barrier()
    emit, close = _emitter(resolved.run_dir, sinks, require_held, rank=topology.rank)
    stop = StopRequest()
    try:
        with stop:
            saves = _save_mode(resolved.config, topology, device, lora)
            run = _build(resolved, device, topology, emit, stop, require_held, saves, lora, rope_base=rope_base)
            run.checkpointer.store.sweep()
            emit(_run_started(resolved, run, data, saves))
            try:
                yield run
                run.checkpointer.finish_save()
            except M1Error as error:  # what is being written is from before it
                if isinstance(error, NumericStop) or topology.world_size == 1:  # else the other ranks may be elsewhere
                    with suppress(M1Error):
                        run.checkpointer.finish_save()
                raise
            emit(RunStopped(reason="done", exit_code=0, wall_s=wall_seconds()))
        close()
    except M1Error as error:
        with suppress(InUse, CheckpointError):  # the first error says what went wrong
            emit(RunStopped(reason=str(error), exit_code=error.exit_code, wall_s=wall_seconds()))
        raise
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(
            f"out of memory outside of a training step: {str(error).splitlines()[0][:200]}",
            where=f"device {device.name}",
            fix="m1 plan shows what fits; more processes, or larger parallel.tensor or parallel.pipeline, divide the weights",
        ) from error
    finally:
        with suppress(CheckpointError):
            close(patience_s=0.0)
        parallel.stop()


def _save_mode(
    config: Config, topology: parallel.Topology, device: device_module.Device, lora: LoraConfig | None = None
) -> SaveMode:
    """Decide with the memory that this machine has now whether saves are written beside training; every rank calls it.

    Raises:
        EnvironmentProblem: there is too little to copy a checkpoint.
    """
    layout = layout_from_sizes(config.parallel, topology.sizes())
    need = run_host_memory(config, layout, per_node=topology.local_world, device=device.name, lora=lora)
    return choose_save_mode(need, agree_min(available_host_gib()), memory_policy_of(config), device=device.name)


def _build(
    resolved: Resolved,
    device: device_module.Device,
    topology: parallel.Topology,
    emit: Sink,
    stop: StopRequest,
    require_held: RequireHeld,
    saves: SaveMode,
    lora: LoraConfig | None,
    *,
    rope_base: float,
) -> Run:
    from m1_stages.model import build_model  # it imports Megatron-Core, which the device redirects first

    config = resolved.config
    model = build_model(
        config.model,
        parallel=config.parallel,
        precision=config.run.precision,
        rope_base=rope_base,
        device=device.name,
        seed=config.run.seed,
        lora=lora,
    )
    trainable = TrainableModel(model, config.parallel)
    optimizer = Optimizer(
        trainable,
        config.optim,
        bf16=config.run.precision == "bf16",
        distributed=config.parallel.distributed_optimizer,
    )
    host = HostCopy()
    if device.name == "cuda":
        host.prepare(round(saves.copy_gib * GIB))
    store = CheckpointStore(
        resolved.run_dir / CHECKPOINTS,
        keep_last=config.run.keep_last,
        deadline_s=SLOW_PHASE_FACTOR * config.parallel.timeout_s,
        before_writing=require_held,
        on_waiting=report_progress,
        on_stuck=dump_stacks,
        on_rejected=lambda path, reason, moved: emit(
            CheckpointRejected(path=str(path), reason=reason, quarantined_as=str(moved))
        ),
        host=host,
    )
    checkpointer = Checkpointer(
        store,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        topology=topology,
        resolved=resolved,
        emit=emit,
        background=saves.background,
        max_failed=config.run.max_failed_saves,
        lora=lora,
    )
    return Run(
        run_dir=resolved.run_dir,
        device=device,
        topology=topology,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        checkpointer=checkpointer,
        emit=emit,
        stop=stop,
        guard=config.guard,
        max_grad_norm=config.optim.grad_clip,
        save_every_steps=config.run.save_every_steps,
        check_replicas_every=config.run.check_replicas_every,
        guess_loss=math.log(config.model.vocab_size),
    )


def put_aside(run_dir: Path) -> None:
    """Rename the checkpoints, the metrics and the roll backs of a run, which starts over."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in (CHECKPOINTS, METRICS, ROLLBACKS):
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.before-{stamp}")


def _emitter(
    run_dir: Path, sinks: Sequence[Sink], require_held: RequireHeld, *, rank: int
) -> tuple[Sink, Callable[..., None]]:
    """Return the function that reports an event and the function that closes the file; ranks other than 0 stay silent."""
    if rank != 0:
        return (lambda event: None), (lambda **patience: None)
    path = run_dir / METRICS
    lines = JsonLines(path, lambda reason: emit(EventsDelayed(path=str(path), reason=reason)))

    def emit(event: Event) -> None:
        require_held()
        lines(event)
        for sink in sinks:
            sink(event)

    return emit, lines.close


def _run_started(resolved: Resolved, run: Run, data: Sequence[str], saves: SaveMode) -> RunStarted:
    from m1_stages.model import backend_choices

    config = resolved.config
    counts = count_parameters(config.model)
    backends = backend_choices(config.model, precision=config.run.precision, device=run.device.torch_device)
    latest = run.checkpointer.store.latest()
    return RunStarted(
        command=" ".join(sys.argv),
        run_dir=str(resolved.run_dir),
        config_sha256=resolved.sha256,
        preset=config.preset,
        device=run.device.name,
        precision=config.run.precision,
        world_size=run.topology.world_size,
        topology=run.topology.sizes(),
        parameters=counts.total,
        active_parameters=counts.active,
        versions={name: version(name) for name in ("m1cli", "torch", "megatron-core")},
        backends=backends,
        resumed_from=str(latest.path) if latest else "",
        data=list(data),
        saves=str(saves),
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
