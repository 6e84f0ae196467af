"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Configuration file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one key; can be repeated.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
GpusOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes on this machine, one per GPU or any number on a CPU; default: parallel.processes, or all GPUs.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Start a stage although the recall of the stage before is below evaluate.gate.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Rename the checkpoints of the stage and of later ones, and start over.")
]
FreshTuningOption = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Rename the checkpoints of the fine-tuning and of those made from it, and start over; others stay.",
    ),
]
DEFAULT_CONFIG = Path("m1.toml")
