"""Shows what ``m1 sft`` would train (``m1 sft --dry-run``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.config.sft_runs import configured_runs, for_run
from m1_stages.jobs.sft_preview import LengthBucket, PreviewSample, preview
from m1cli.console import console
from m1cli.sft.lines import domain_rows, reflection_rows, sft_data_lines

_MOST_CHARACTERS = 1_200
"""Of one part of a sample; of longer ones the beginning and the end are shown."""
_BAR = 40


def sft_preview_command(config: Path, overrides: list[str], name: str | None, *, samples: int) -> None:
    """Print samples with their mask, lengths, packing, domains and reflection: of the run ``name``, or of all in order."""
    resolved = load_config(config, overrides)
    runs = [name] if name else configured_runs(resolved.config.sft)
    for run in runs:
        if len(runs) > 1:
            console.rule(f"fine-tuning {run}")
        _show(for_run(resolved, run), samples)
    console.print("[dim]dry run: nothing was trained or written[/]")


def _show(resolved: Resolved, samples: int) -> None:
    found = preview(resolved, samples=samples)
    stats = dataclasses.asdict(found.stats)
    colours = console.color_system is not None
    legend = "[bold green]trained[/] [dim]not trained[/]" if colours else "⟦trained⟧ not trained"
    for sample in found.samples:
        where = f"{sample.where}, {sample.tokens:,} tokens" + (f", domain {sample.domain}" if sample.domain else "")
        console.print(f"\n[bold]{escape(where)}[/]  {legend}", soft_wrap=True)
        console.print(_text(sample, colours=colours), soft_wrap=True)
    console.print("\n[bold]lengths[/] in tokens")
    console.print(_histogram(found.lengths))
    _table(("domain", "conversations", "share", "trained tokens", "share"), domain_rows(stats))
    _table(
        ("reflection", "before", "per 1k tokens", "after selection", "per 1k tokens"),
        reflection_rows(stats),
    )
    data, lost = sft_data_lines(stats)
    for line in data:
        console.print(escape(line), soft_wrap=True)
    for line in lost:
        console.print(f"[bold yellow]{escape(line)}[/]", soft_wrap=True)


def _text(sample: PreviewSample, *, colours: bool) -> Text:
    text = Text()
    for span in sample.spans:
        shown = _shortened(span.text)
        if colours:
            text.append(shown, "bold green" if span.trained else "dim")
        else:
            text.append(f"⟦{shown}⟧" if span.trained else shown)
    return text


def _shortened(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    left = len(text) - 2 * half
    return text if left <= 0 else f"{text[:half]} … {left:,} characters … {text[-half:]}"


def _histogram(buckets: list[LengthBucket]) -> Table:
    table = Table.grid(padding=(0, 2))
    most = max(bucket.samples for bucket in buckets)
    for bucket in buckets:
        bar = "█" * max(bucket.samples > 0, round(_BAR * bucket.samples / most))
        table.add_row(f"{bucket.first:,} to {bucket.last:,}", f"{bucket.samples:,}", bar)
    return table


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print("")
    console.print(table)
