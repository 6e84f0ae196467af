"""Implements ``m1 generate --serve``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from m1_stages.config.load import load_config
from m1_stages.errors import Preempted
from m1cli.console import console
from m1cli.library_notes import hide_library_notes

if TYPE_CHECKING:
    from m1_stages.jobs.serving.app import Version


def serve_command(
    path: Path,
    overrides: list[str],
    *,
    stage: str | None,
    checkpoint: Path | None,
    host: str,
    port: int,
    slots: int,
    context: int | None,
    prefill_tokens: int,
) -> None:
    """Serve a checkpoint of the run until a signal comes.

    Raises:
        Preempted: a signal other than Ctrl-C ended it.
        M1Error: what ``serve`` raises.
    """
    from m1_stages.jobs.serving.run import ONE_DEVICE, ServeOptions, serve

    hide_library_notes()
    resolved = load_config(path, [*overrides, *ONE_DEVICE])
    options = ServeOptions(
        host=host,
        port=port,
        stage=stage,
        checkpoint=checkpoint,
        slots=slots,
        context=context,
        prefill_tokens=prefill_tokens,
    )

    def ready(address: str, version: Version, context: int) -> None:
        console.print(
            f"{escape(version.checkpoint)} (stage {version.stage}), context {context:,}, {slots} answers at a time\n"
            f"{address}/v1   model {escape(resolved.run_dir.name)}; Ctrl-C ends it",
            soft_wrap=True,
        )

    received = serve(resolved, options, on_ready=ready)
    console.print("[dim]stopped[/]")
    if received == signal.SIGINT.name:
        raise typer.Exit(130)
    if received != "request":
        raise Preempted(f"stopped on {received}", fix="start it again with the same command")
