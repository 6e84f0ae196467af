"""Curves of `benchmarks/length_extension.py`: loss, gradient norm, early over late layers and recall, by tokens trained.

python benchmarks/plot_length_extension.py WORK/results.json length-extension.svg [--only jump,relax]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

LEFT, TOP, WIDTH, HEIGHT, GAP, LEGEND = 62, 58, 640, 170, 46, 150
COLORS = {
    "jump": "#d08770", "jump-lr3": "#b5451f", "jump-lr10": "#7a1f0c", "jump-deep": "#e3b448", "jump-batch": "#c9a227",
    "fixed": "#6b7280", "relax": "#1f6f8b", "stretch": "#5b8c5a", "relax-guard": "#0b3d91", "stretch-guard": "#1d4d2b",
    "fixed-guard": "#374151", "bad": "#a855a5", "bad-guard": "#5e2a84", "bad-fixed": "#d6409f", "bad-fixed-guard": "#8e1f5e",
}  # fmt: skip
PANELS: tuple[tuple[str, int, bool], ...] = (
    ("loss, nats", 2, False),
    ("gradient norm before clipping", 3, True),
    ("gradient norm of the early third of the layers over the late third", 4, True),
)
"""Title, column of a curve, logarithmic."""
Points = list[tuple[float, float]]
"""Tokens trained, and what was seen there."""


def text(x: float, y: float, content: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{content}</text>'


def scale(values: list[float], log: bool) -> tuple[Callable[[float], float], list[float]]:
    """Value to 0..1, and where to draw lines."""
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.2, high * 1.2
        ticks = [m * 10.0**e for e in range(-4, 5) for m in (1, 3) if low <= m * 10.0**e <= high]
        return (lambda v: math.log(v / low) / math.log(high / low)), ticks
    low, high = math.floor(low), math.ceil(high)
    ticks = [low + n / 4 for n in range(5)] if high - low == 1 else []
    return (lambda v: (v - low) / (high - low)), ticks or [
        float(v) for v in range(low, high + 1, -(-(high - low) // 6))
    ]


def recall_points(run: dict[str, Any]) -> list[tuple[float, float]]:
    """Recall after each stage, at the tokens trained by then."""
    ends = {stage: tokens for tokens, stage, *_ in run["curve"]}
    return [(ends[stage], recall) for stage, recall in run["recall"].items() if recall is not None]


def panel(curves: dict[str, Points], stages: dict[str, float], title: str, log: bool, top: float) -> Iterator[str]:
    first = min(points[0][0] for points in curves.values())
    last = max(points[-1][0] for points in curves.values())
    place, ticks = scale([max(value, 1e-4) for points in curves.values() for _, value in points], log)
    yield text(LEFT, top - 6, title, 'class="head"')
    for tick in ticks:
        y = top + HEIGHT * (1 - place(tick))
        yield f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#e5e7eb"/>'
        yield text(LEFT - 6, y + 4, f"{tick:g}", 'text-anchor="end" class="small"')
    for stage, tokens in stages.items():
        x = LEFT + WIDTH * max(0.0, tokens - first) / (last - first)
        yield f'<path d="M{x:.1f} {top}V{top + HEIGHT}" stroke="#9ca3af" stroke-dasharray="2 3"/>'
        yield text(x + 3, top + HEIGHT - 5, stage, 'class="small"')
    for name, points in curves.items():
        line = " ".join(
            f"{LEFT + WIDTH * (tokens - first) / (last - first):.1f},{top + HEIGHT * (1 - place(max(value, 1e-4))):.1f}"
            for tokens, value in points
        )
        yield f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}" stroke-width="1.1" stroke-opacity="0.85"/>'
    yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#9ca3af"/>'


def picture(runs: dict[str, Any], title: str, start: int) -> str:
    height = TOP + (len(PANELS) + 1) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + LEGEND} {height}" role="img">',
        f"<title>{title}</title>",
        "<style>text{font:12px sans-serif;fill:#222}.small{font-size:10px}.head{font-weight:bold}</style>",
        f'<rect width="100%" height="{height}" fill="white"/>',
        text(LEFT, 22, title, 'class="head"'),
    ]
    for n, name in enumerate(runs):
        y = TOP + 8 + 18 * n
        parts.append(f'<path d="M{LEFT + WIDTH + 14} {y}h22" stroke="{COLORS[name]}" stroke-width="3"/>')
        parts.append(text(LEFT + WIDTH + 42, y + 4, name))
    stages: dict[str, float] = {}
    for name, run in runs.items():
        if not name.startswith("jump"):
            for tokens, stage, *_ in run["curve"]:
                stages.setdefault(stage, tokens)
    for n, (heading, column, log) in enumerate(PANELS):
        curves = {  # of steps that were made again after a roll back, the last
            name: sorted({row[0]: row[column] for row in run["curve"] if row[0] >= start}.items())
            for name, run in runs.items()
        }
        parts += panel(curves, stages, heading, log, TOP + n * (HEIGHT + GAP))
    recall = {name: [(float(start), run["recall"]["32k"]), *recall_points(run)[1:]] for name, run in runs.items()}
    parts += panel(recall, stages, "recall of needles after each stage", False, TOP + len(PANELS) * (HEIGHT + GAP))
    parts.append(
        text(LEFT + WIDTH, height - 26, "tokens trained; dashed: where the five stages begin", 'text-anchor="end"')
    )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="what benchmarks/length_extension.py wrote")
    parser.add_argument("svg", help="the picture to write")
    parser.add_argument("--only", default="", help="variants, with commas; default: all there are")
    parser.add_argument("--title", default="Extending the context")
    parser.add_argument("--start", type=int, default=0, help="tokens trained where the picture begins")
    args = parser.parse_args()
    with open(args.results) as file:
        variants = json.load(file)["variants"]
    wanted = args.only.split(",") if args.only else list(variants)
    runs = {name: run for name in wanted for run in variants[name].values() if run.get("curve")}
    with open(args.svg, "w") as file:
        file.write(picture(runs, args.title, args.start))


if __name__ == "__main__":
    main()
