"""Tables and numbers as ``m1 plan`` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from m1_stages.plan.estimate import StageEstimate
from m1_stages.plan.search import LayoutEstimate


def table_of(title: str, first: str, columns: Sequence[str]) -> Table:
    """Return an empty table with one column of names and others of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def add_parts(
    table: Table,
    stages: list[StageEstimate],
    names: dict[str, str],
    value: Callable[[LayoutEstimate], Any],
    digits: int,
) -> None:
    """Add a row for each of ``names`` (title to attribute) that is not zero everywhere, of layout #1 of each stage."""
    for title, name in names.items():
        numbers = [getattr(value(stage.layouts[0]), name) for stage in stages]
        if any(round(number, digits) for number in numbers):
            table.add_row(f"[dim]{title}[/]", *(f"{number:,.{digits}f}" if number else "-" for number in numbers))


def hours_text(hours: float | None) -> str:
    """Return hours in two digits or more, ``-`` when they are not known."""
    return "-" if hours is None else si(hours) if hours >= 1000 else f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def seconds_text(seconds: float) -> str:
    """Return seconds in three digits or more."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"


def si(number: float, units: Sequence[str] = ("Z", "E", "P", "T", "G", "M", "k")) -> str:
    """Return ``number`` with a unit prefix."""
    size = 10.0 ** (3 * len(units))
    for unit in units:
        if number >= size:
            value = number / size
            return (
                f"{value:,.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}" if value >= 10 else f"{value:.2f}{unit}"
            )
        size /= 1000
    return f"{number:.3g}"


def count(number: int) -> str:
    """Return a number of parameters, such as ``456.1B``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"
