"""Implements ``m1 demo``: an end-to-end run by the commands that a user would type, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import typer
from rich.markup import escape

from m1_data.storage.ownership import refuse_to_replace
from m1_stages.packages import require_packages
from m1_stages.run_dir import EXPORT_PREFIX, REPORT
from m1cli.console import console

PACKAGES = ("sympy", "mpmath", "networkx", "transformers", "plotly")
"""Of the extra ``demo``: text is collected from some of them, and the last commands need the others."""
INTERMEDIATE_STAGE = "256k"
PROMPTS = ("def add(self, other):", "What is (12 + 30) * 2?", "import os\n")


def demo_command(folder: Path) -> None:
    """Write the demo's configuration and text, then run every command on it; a second run continues."""
    from m1cli.demo_corpus import CONFIG, write_demo

    began = time.perf_counter()
    require_packages(*PACKAGES, for_what="the demo", extra="demo")
    _refuse_foreign(folder)
    if _configuration(folder) in ("", CONFIG):  # none, or what an interrupted start began with
        console.print(f"collecting text from this machine's Python installation into {escape(str(folder))}/")
        write_demo(folder)
    for arguments in (
        ["stages"],
        ["prepare-data"],
        ["pretrain", "--stage", "all"],
        ["sft"],
        ["export", "--stage", "1m", "--verify", "--overwrite"],
        ["export", "--stage", INTERMEDIATE_STAGE, "--verify", "--overwrite"],
        ["export", "--stage", "sft", "--verify", "--overwrite", *(x for p in PROMPTS for x in ("--prompt", p))],
        ["report"],
    ):
        _run(folder, arguments)
    console.print(f"\n[bold green]end-to-end run finished in {time.perf_counter() - began:.0f} s[/]")
    console.print(f"  report  {escape(str(folder / 'run' / REPORT))}", soft_wrap=True)
    console.print(f"  model   {escape(str(folder / 'run' / f'{EXPORT_PREFIX}sft'))}", soft_wrap=True)


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo.

    Raises:
        ConfigError: nothing was written.
    """
    fix = "give another --dir"
    refuse_to_replace(
        folder, what="the folder of the demo (--dir)", marked=bool(_configuration(folder)), ours=("*",), fix=fix
    )


def _configuration(folder: Path) -> str:
    """The demo's configuration in ``folder``; empty when there is none, or one of somebody else's."""
    from m1cli.demo_corpus import CONFIG

    try:
        text = (folder / "m1.toml").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
    return text if text.startswith(CONFIG.splitlines()[0]) else ""


def _run(folder: Path, arguments: list[str]) -> None:
    shown = " ".join(repr(a) if " " in a or "\n" in a else a for a in arguments)
    console.print(f"\n[bold]$ m1 {escape(shown)}[/]", soft_wrap=True)
    code = subprocess.run(
        [sys.executable, "-m", "m1cli", *arguments], cwd=folder, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False
    ).returncode
    if code:
        raise typer.Exit(code)
