"""``m1 pretrain`` and ``m1 sft``: check the configuration, start the processes, show the run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import typer

from m1_data.storage.lock import lock_of, reading, refuse_while_written
from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.config.sft_runs import configured_runs, for_run, is_sft, refuse_unknown_stage, run_of_stage
from m1_stages.curriculum import stages_of
from m1_stages.errors import EXIT_PREEMPTED, ConfigError, EnvironmentProblem, RankLost
from m1_stages.events import Sink
from m1_stages.run_dir import LOCK, TENSORBOARD, refuse_foreign_run_dir
from m1_stages.runtime.imports import importing
from m1_stages.runtime.watchdog import Watchdog
from m1cli.console import console, is_rank_0
from m1cli.display import TrainingDisplay
from m1cli.errors import show
from m1cli.launch import LAUNCHER, adopt_slurm, die_with_launcher, is_worker, num_processes, run_ranks
from m1cli.library_notes import hide_library_notes

_LAUNCHER_ENDS_US_S = 3.0


def pretrain_command(
    config: Path, overrides: list[str], stage: str, *, gpus: int | None, fresh: bool, force: bool
) -> None:
    """Train one stage or all."""
    resolved = load_config(config, [*overrides, *_processes(gpus)])
    stages = stages_of(stage)

    def train(sinks: list[Sink]) -> None:
        with importing():
            from m1_stages.jobs import pretrain

        pretrain.run(resolved, stages, sinks, fresh=fresh, force=force)

    _start(resolved, train)


def evaluate_command(config: Path, overrides: list[str], stage: str, *, gpus: int | None) -> None:
    """Evaluate the final checkpoint of one stage."""
    resolved = load_config(config, [*overrides, *_processes(gpus)])
    refuse_unknown_stage(resolved.config.sft, stage)

    def measure(sinks: list[Sink]) -> None:
        with importing():
            from m1_stages.jobs import evaluate, sft

        if is_sft(stage):
            sft.evaluate(for_run(resolved, run_of_stage(stage)), sinks)
        else:
            evaluate.run(resolved, stage, sinks)

    _start(resolved, measure)


def sft_command(config: Path, overrides: list[str], name: str | None, *, gpus: int | None, fresh: bool) -> None:
    """Fine-tune: the run ``name``; None does all that are configured, in order."""
    resolved = load_config(config, [*overrides, *_processes(gpus)])
    names = [name] if name else configured_runs(resolved.config.sft)
    if len(names) > 1:
        return _in_turn(resolved, names)
    resolved = for_run(resolved, names[0])

    def train(sinks: list[Sink]) -> None:
        with importing():
            from m1_stages.jobs import sft

        sft.run(resolved, sinks, fresh=fresh)

    _start(resolved, train)


def _in_turn(resolved: Resolved, names: list[str]) -> None:
    """Run the same command once for each name, in processes of its own: ranks cannot meet a second time in one process."""
    if is_worker():
        raise ConfigError(
            f"{len(names)} fine-tunings are configured, and ranks that were started already can do one",
            where="key sft.runs",
            fix=f"name it, one command after the other: {', then '.join(f'm1 sft --name {name}' for name in names)}",
        )
    world, asked = num_processes(resolved), list[int]()
    for number, name in enumerate(names, 1):
        console.rule(f"fine-tuning {name} ({number} of {len(names)})")
        code = run_ranks([*sys.argv[1:], "--name", name], world, resolved.run_dir, asked)
        if code or asked:
            raise typer.Exit(code or EXIT_PREEMPTED)


def _processes(gpus: int | None) -> list[str]:
    return [] if gpus is None else [f"parallel.processes={gpus}"]


def _start(resolved: Resolved, train: Callable[[list[Sink]], None]) -> None:
    deadline_s = resolved.config.parallel.timeout_s
    if is_rank_0:  # before torch is imported or a process started; the session takes the lock itself
        refuse_foreign_run_dir(resolved.run_dir)
        refuse_while_written(resolved.run_dir / LOCK, f"the run directory {resolved.run_dir}")
    if is_worker():
        adopt_slurm()
        die_with_launcher()
    elif (world := num_processes(resolved)) > 1:
        code = run_ranks(sys.argv[1:], world, resolved.run_dir)
        raise typer.Exit(code)
    hide_library_notes()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with _reading_data(resolved), TrainingDisplay() as display:

        def abandon(error: RankLost) -> None:
            display.__exit__()  # the process is about to leave without unwinding: give the terminal back
            show(error)

        with Watchdog(resolved.run_dir, rank=rank, world=world, deadline_s=deadline_s, on_expired=abandon) as watchdog:
            sinks: list[Sink] = [display]
            if resolved.config.run.tensorboard:
                sinks.append(_tensorboard(resolved))
            try:
                train(sinks)
            except RuntimeError as error:
                if world == 1 or not _lost_connection(error):
                    raise
                if LAUNCHER in os.environ:  # it knows which process died and with what, and ends this one
                    time.sleep(_LAUNCHER_ENDS_US_S)
                raise watchdog.verdict("the connection to another rank broke") from error


def _reading_data(resolved: Resolved) -> AbstractContextManager[None]:
    """Keep the prepared data from being replaced while a run reads it; its first rank does so for all."""
    data_dir = resolved.path(resolved.config.data.out)
    return reading(lock_of(data_dir), f"the prepared data {data_dir}") if is_rank_0 else nullcontext()


def _lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank (gloo raises bare RuntimeErrors)."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()


def _tensorboard(resolved: Resolved) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem(
            "run.tensorboard is on, but tensorboard is not installed",
            fix="pip install 'm1cli[tensorboard]', or set run.tensorboard = false",
        ) from error
    from m1_stages.events import Event, StepDone

    writer = SummaryWriter(str(resolved.run_dir / TENSORBOARD))

    def sink(event: Event) -> None:
        if isinstance(event, StepDone):
            for name in ("loss", "aux_loss", "grad_norm", "lr", "tokens_per_s", "ramp_progress"):
                writer.add_scalar(f"train/{name}", getattr(event, name), event.global_step)
            with suppress(OSError):  # a full disk: metrics.jsonl is the truth
                writer.flush()

    return sink
