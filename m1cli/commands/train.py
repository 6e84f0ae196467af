"""``m1 pretrain`` and ``m1 sft``: check the configuration, start the processes, show the run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import typer

from m1_data.errors import EnvironmentProblem
from m1_stages.config import Resolved
from m1_stages.configload import load_config
from m1_stages.curriculum import stages_of
from m1_stages.engine.events import Sink
from m1cli.display import TrainingDisplay
from m1cli.launch import adopt_slurm, is_worker, num_processes, run_ranks


def pretrain_command(config: Path, overrides: list[str], stage: str, *, fresh: bool) -> None:
    """Train one stage or all."""
    resolved = load_config(config, overrides)
    stages = stages_of(stage)

    def train(sinks: list[Sink]) -> None:
        from m1_stages.engine import pretrain

        pretrain.run(resolved, stages, sinks, fresh=fresh)

    _start(resolved, train)


def sft_command(config: Path, overrides: list[str], *, fresh: bool) -> None:
    """Fine-tune."""
    resolved = load_config(config, overrides)

    def train(sinks: list[Sink]) -> None:
        from m1_stages.engine import sft

        sft.run(resolved, sinks, fresh=fresh)

    _start(resolved, train)


def _start(resolved: Resolved, train: Callable[[list[Sink]], None]) -> None:
    if is_worker():
        adopt_slurm()
    elif (world := num_processes(resolved)) > 1:
        code = run_ranks(sys.argv[1:], world)
        raise typer.Exit(code)
    warnings.filterwarnings("ignore", module=r"megatron\..*")  # about Transformer Engine and Apex, which we do without
    with TrainingDisplay() as display:
        sinks: list[Sink] = [display]
        if resolved.config.run.tensorboard:
            sinks.append(_tensorboard(resolved))
        train(sinks)


def _tensorboard(resolved: Resolved) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem(
            "run.tensorboard is on, but tensorboard is not installed",
            fix="pip install 'm1cli[tensorboard]', or set run.tensorboard = false",
        ) from error
    from m1_stages.engine.events import Event, StepDone

    writer = SummaryWriter(str(resolved.run_dir / "tensorboard"))

    def sink(event: Event) -> None:
        if isinstance(event, StepDone):
            for name in ("loss", "aux_loss", "grad_norm", "lr", "tokens_per_s", "ramp_progress"):
                writer.add_scalar(f"train/{name}", getattr(event, name), event.global_step)
            writer.flush()

    return sink
