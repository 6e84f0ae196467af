"""Defines the ``m1`` command. Command bodies import what they need, so that ``--help`` is instant and needs no torch."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from m1_stages.runtime.signals import leaving_with_its_own_exit_code
from m1cli.console import visible
from m1cli.errors import EXIT_CODES, reported
from m1cli.generate_cli import generate
from m1cli.options import (
    DEFAULT_CONFIG,
    ConfigOption,
    DebugOption,
    ForceOption,
    FreshOption,
    FreshTuningOption,
    GpusOption,
    SetOption,
)

_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""The base of typer's own errors, which it does not export."""


class _Commands(TyperGroup):
    """The commands; what a message repeats of the command line has no control characters."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _visible():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _visible():
            return super().invoke(ctx)


@contextmanager
def _visible() -> Iterator[None]:
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = visible(error.message)
        raise


app = typer.Typer(
    name="m1",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train lightning-attention hybrid MoE language models from raw text to a million-token context.",
    epilog=EXIT_CODES.replace("\n", " "),
)
config_app = typer.Typer(no_args_is_help=True, help="Show the resolved configuration.")
app.add_typer(config_app, name="config")
launch_app = typer.Typer(no_args_is_help=True, help="Write a script that runs training on a cluster.")
app.add_typer(launch_app, name="launch")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder for the new m1.toml.")],
    preset: Annotated[str, typer.Option(help="tiny, 700m, 7b-a1b or m1-456b.")] = "tiny",
    debug: DebugOption = False,
) -> None:
    """Write a commented m1.toml."""
    with reported(debug):
        from m1cli.commands.config import init_command

        init_command(folder, preset)


@config_app.command("show")
def config_show(
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Values only, as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Print every resolved value and where it came from."""
    with reported(debug, prints_result=True):
        from m1cli.commands.config import show_command

        show_command(config, overrides or [], as_json=as_json)


@app.command()
def doctor(
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Check packages, GPUs, network, disk and limits of this machine; say what is wrong and how to fix it."""
    with reported(debug, prints_result=True):
        from m1cli.commands.doctor import doctor_command

        doctor_command(config, overrides or [], as_json=as_json)


@app.command()
def stages(
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show the stages: state, context, mix, learning rates, decay half-lives, layout, checkpoints, needle recall."""
    with reported(debug, prints_result=True):
        from m1cli.commands.stages import stages_command

        stages_command(config, overrides or [], as_json=as_json)


@app.command()
def plan(
    config: ConfigOption = DEFAULT_CONFIG,
    preset: Annotated[str | None, typer.Option(help="Plan a preset without a configuration file.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs; default: as many as the parallel sizes need.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, h800, h20, a100, a800, b200 or rtx4090.")] = "h100",
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Estimate what training will cost: parameters, FLOPs, memory, time, and the parallel layouts that fit."""
    with reported(debug, prints_result=True):
        from m1cli.commands.plan import plan_command

        plan_command(config, preset, gpus, gpu, overrides or [], as_json=as_json)


@app.command("prepare-data")
def prepare_data(
    config: ConfigOption = DEFAULT_CONFIG, overrides: SetOption = None, debug: DebugOption = False
) -> None:
    """Turn raw text into clean, deduplicated, tokenized shards with a mix per stage."""
    with reported(debug):
        from m1cli.commands.prepare_data import prepare_command

        prepare_command(config, overrides or [])


@app.command()
def pretrain(
    stage: Annotated[str, typer.Option(help="32k, 128k, 256k, 512k, 1m or all.")],
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    gpus: GpusOption = None,
    fresh: FreshOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Train one stage of the context curriculum, or all; the same command continues an interrupted run."""
    with reported(debug):
        from m1cli.commands.train import pretrain_command

        pretrain_command(config, overrides or [], stage, gpus=gpus, fresh=fresh, force=force)


@app.command()
def evaluate(
    stage: Annotated[str, typer.Option(help="Finished stage: 32k to 1m, sft, or sft-NAME for a named fine-tuning.")],
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    gpus: GpusOption = None,
    debug: DebugOption = False,
) -> None:
    """Evaluate a finished stage: needle recall and loss by position in held-out documents; for fine-tuning, loss by domain."""
    with reported(debug):
        from m1cli.commands.train import evaluate_command

        evaluate_command(config, overrides or [], stage, gpus=gpus)


@app.command()
def sft(
    name: Annotated[
        str | None,
        typer.Option(
            help="One of \\[\\[sft.runs]], or sft for the section itself. Default: all runs in order, else the section."
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    gpus: GpusOption = None,
    fresh: FreshTuningOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show samples with their loss mask, lengths, packing, domains; train nothing."),
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Samples that --dry-run shows.")] = 3,
    debug: DebugOption = False,
) -> None:
    """Fine-tune the final checkpoint of a stage, an import, or another fine-tuning on chain-of-thought conversations."""
    with reported(debug, prints_result=dry_run):
        if dry_run:
            from m1cli.sft.preview import sft_preview_command

            return sft_preview_command(config, overrides or [], name, samples=samples)
        from m1cli.commands.train import sft_command

        sft_command(config, overrides or [], name, gpus=gpus, fresh=fresh)


@launch_app.command("slurm")
def launch_slurm(
    command: Annotated[list[str], typer.Argument(help="After --: pretrain or sft with its options.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each machine; one rank each.")] = 8,
    time: Annotated[str | None, typer.Option(help="Time limit of one job, like 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    job_name: Annotated[str, typer.Option(help="Name of the job and of its log.")] = "m1",
    container: Annotated[str | None, typer.Option(help="Image with m1 installed; needs Slurm's pyxis plugin.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Another sbatch option: --sbatch=--qos=high; can be repeated."),
    ] = None,
    save_before: Annotated[
        int, typer.Option(min=1, help="Seconds before the time limit at which ranks save and the job requeues.")
    ] = 300,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("m1.sbatch"),
    debug: DebugOption = False,
) -> None:
    """Write a batch script that starts one rank per GPU, saves before the time limit, requeues itself and continues."""
    with reported(debug):
        from m1cli.commands.launch import slurm_command

        slurm_command(
            command,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            save_before_s=save_before,
            out=out,
            container=container,
            options={"job-name": job_name, "time": time, "partition": partition, "account": account},
            extra=sbatch or [],
        )


@app.command()
def export(
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Stage whose final checkpoint is exported (32k to 1m, sft, sft-NAME); default: the newest."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="One checkpoint directory instead of a stage.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN_DIR/export-STAGE[-TARGET].")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every tensor and byte back, compute logits with a loader of the target, and compare with the checkpoint.",
        ),
    ] = False,
    verify_only: Annotated[
        Path | None,
        typer.Option(
            metavar="EXPORT", help="Verify this existing export, and write nothing; exit code 5 if it differs."
        ),
    ] = None,
    target: Annotated[
        Literal["hf", "text01", "gguf"] | None,
        typer.Option(
            help="Who reads it: transformers; released code, vLLM <= 0.23; llama.cpp. Default: export.target."
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where a verification computes.")] = "cpu",
    prompt: Annotated[list[str] | None, typer.Option(help="Generate from this text with transformers.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing export.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint for transformers, for the released code, or for llama.cpp, and verify it."""
    with reported(debug):
        from m1cli.commands.export import export_command

        export_command(
            config,
            overrides or [],
            stage,
            out,
            verify=verify,
            verify_only=verify_only,
            prompts=prompt or [],
            overwrite=overwrite,
            checkpoint=checkpoint,
            target=target,
            device=device,
        )


app.command()(generate)


@app.command("import")
def import_model(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder; with --dry-run an index file does, too.")],
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare names, shapes and bytes with the model, and write nothing.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the model section of m1.toml that fits, and write nothing.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="With --dry-run: the model, when there is no config.json beside the index.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Rename the checkpoints of the run, and start it over from the import.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Start a run from a checkpoint of MiniMax-Text-01, MiniMax-M1 or m1; pretrain and sft then begin with its weights."""
    with reported(debug):
        from m1cli.commands.import_model import import_command

        import_command(
            source,
            config,
            overrides or [],
            dry_run=dry_run,
            print_config=print_config,
            preset=preset,
            fresh=fresh,
        )


@app.command()
def report(
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="HTML file; default: RUN_DIR/report.html.")] = None,
    debug: DebugOption = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    with reported(debug):
        from m1cli.commands.report import report_command

        report_command(config, overrides or [], out)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of the demo.")] = Path("demo"),
    debug: DebugOption = False,
) -> None:
    """Do an end-to-end run with a tiny model: text, five stages, fine-tuning, export, report."""
    with reported(debug):
        from m1cli.commands.demo import demo_command

        demo_command(folder)


def main() -> None:
    """Run the ``m1`` command."""
    with leaving_with_its_own_exit_code():
        try:
            app()
        except SystemExit as end:
            _leave(end.code)
            raise


def _leave(code: object) -> None:
    """End the process without taking Python apart, where torch is loaded: that takes a second.

    Exit functions run and streams are flushed; where a stream cannot be, or a thread has to be waited for, Python ends as always.
    """
    waits = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    if "torch" not in sys.modules or waits or not isinstance(code, int | None):
        return
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: a process without standard output
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
