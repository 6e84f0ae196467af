"""Implements ``m1 doctor``, which checks the machine before a long run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer
from rich.markup import escape

from m1_stages.config.load import load_config
from m1_stages.doctor.checks import examine
from m1_stages.errors import EXIT_ENVIRONMENT
from m1cli.console import console

_NAME_WIDTH = 27


def doctor_command(config: Path, overrides: list[str], *, as_json: bool) -> None:
    """Print one line for each check; exit with ``EXIT_ENVIRONMENT`` when something is wrong.

    A configuration is used if there is one: it names the run directory and the size of a checkpoint.
    """
    resolved = load_config(config, overrides) if config.exists() or overrides else None
    findings = []
    for finding in examine(Path.cwd(), resolved):
        findings.append(finding)
        if as_json:
            continue
        word = "[green]ok[/]     " if finding.ok else "[bold red]problem[/]"
        console.print(f"{word}  {finding.name:<{_NAME_WIDTH}} {escape(finding.detail)}", soft_wrap=True)
        if finding.fix:
            console.print(f"         {'':<{_NAME_WIDTH}} [yellow]do:[/] {escape(finding.fix)}", soft_wrap=True)
    problems = sum(not finding.ok for finding in findings)
    if as_json:
        record = {"ok": not problems, "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(record, indent=2))
    elif problems:
        console.print(f"[bold red]{problems} problem{'s' if problems > 1 else ''}[/]")
    else:
        console.print("[green]everything is ok[/]")
    if problems:
        raise typer.Exit(EXIT_ENVIRONMENT)
