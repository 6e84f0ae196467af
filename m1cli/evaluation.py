"""Shows an evaluation on a terminal: needle recall as coloured numbers, and the loss by position as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from m1_stages.event_values import NeedleMap, PositionLoss
from m1_stages.events import StageEvaluated

_COLOURS = ((120, 30, 40), (178, 110, 20), (30, 120, 60))
"""Background colours (red, green, blue) at a recall of 0, a half and 1."""


def evaluation_view(result: StageEvaluated) -> Group:
    """Return all tables of one evaluation."""
    parts: list[RenderableType] = []
    if result.needles:
        parts.append(needle_table(result.stage, result.needles))
    if result.positions:
        parts.append(position_table(result.stage, result.seq_len, result.positions))
    parts += [Text.from_markup(f"[yellow]not measured: {escape(reason)}[/]") for reason in result.skipped]
    return Group(*parts, Text.from_markup(f"[dim]measured in {result.seconds:.1f} s[/]"))


def needle_table(stage: str, needles: NeedleMap) -> Table:
    """Return the recall in percent by depth and length, and the recall of a text with nothing hidden."""
    found, guessed = _mean(needles.loss), sum(needles.control_loss) / len(needles.control_loss)
    table = Table(
        title=f"stage {stage}: needle recall %, mean {100 * _mean(needles.recall):.0f}",
        title_justify="left",
        caption=f"{needles.samples} samples a cell in {needles.haystack}; loss of the answer {found:.2f}, with nothing "
        f"hidden {guessed:.2f}",
        caption_justify="left",
    )
    table.add_column("hidden at", justify="right", no_wrap=True)
    for length in needles.lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    for depth, row in zip(needles.depths, zip(*needles.recall, strict=True), strict=True):
        where = {0.0: "begin 0 %", 1.0: "end 100 %"}.get(depth, f"{depth:.0%}".replace("%", " %"))
        table.add_row(where, *(recall_text(value) for value in row))
    table.add_row("[dim]nothing hidden[/]", *(f"[dim]{100 * value:.0f}[/]" for value in needles.control_recall))
    return table


def recall_text(value: float) -> Text:
    """Return a recall of 0 to 1 as a percentage on a colour."""
    place = min(1.0, max(0.0, value)) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(_COLOURS[low], _COLOURS[low + 1], strict=True))
    return Text(f" {100 * value:3.0f} ", style=f"bold white on rgb({','.join(map(str, mixed))})")


def position_table(stage: str, seq_len: int, positions: PositionLoss) -> Table:
    """Return the loss by the number of preceding tokens, with and without the far context."""
    table = Table(title=f"stage {stage}: loss by position in held-out documents", title_justify="left")
    for name in ("tokens before", "loss", f"seeing ≤ {positions.near_tokens:,}", "gain", "documents"):
        table.add_column(name, justify="right", no_wrap=True)
    ends = [*(first - 1 for first in positions.first[1:]), seq_len - 1]
    rows: Any = zip(positions.first, ends, positions.loss, positions.near_loss, positions.documents, strict=True)
    for first, end, loss, near, documents in rows:
        far = end >= positions.near_tokens
        colour = "dim" if abs(near - loss) < 0.0005 else "green" if near > loss else "red"
        gain = f"[{colour}]{near - loss:+.3f}[/]" if far else ""
        table.add_row(f"{first:,}–{end:,}", f"{loss:.3f}", f"{near:.3f}" if far else "", gain, f"{documents}")
    return table


def _mean(grid: list[list[float]]) -> float:
    values = [value for row in grid for value in row]
    return sum(values) / len(values)
