"""Implements ``m1 report``, which writes one HTML page about a run."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from m1_data.storage.manifest import MANIFEST
from m1_stages.config.load import load_config
from m1_stages.run_dir import REPORT
from m1cli.console import console


def report_command(path: Path, overrides: list[str], out: Path | None) -> None:
    """Write the report of the configured run."""
    from m1cli.report.html import write_report

    resolved = load_config(path, overrides)
    manifest = resolved.path(resolved.config.data.out) / MANIFEST
    written = write_report(resolved.run_dir, manifest if manifest.is_file() else None, out or resolved.run_dir / REPORT)
    console.print(f"wrote [bold]{escape(str(written))}[/]", soft_wrap=True)
