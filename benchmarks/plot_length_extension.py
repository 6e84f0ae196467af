"""Curves of `benchmarks/length_extension.py`: loss, gradient norm and early over late layers, by tokens trained.

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
    "bad": "#a855a5", "bad-guard": "#5e2a84",
}  # fmt: skip
PANELS: tuple[tuple[str, int, bool], ...] = (
    ("loss, nats", 2, False),
    ("gradient norm before clipping", 3, True),
    ("gradient norm of the early third of the layers over the late third", 4, True),
)
"""Title, column of a curve, logarithmic."""


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
    step = max(1, round((high - low) / 6))
    return (lambda v: (v - low) / (high - low)), [float(v) for v in range(low, high + 1, step)]


def panel(variants: dict[str, Any], title: str, column: int, log: bool, top: float) -> Iterator[str]:
    curves = {name: v["curve"] for name, v in variants.items()}
    last = max(c[-1][0] for c in curves.values())
    place, ticks = scale([max(row[column], 1e-4) for c in curves.values() for row in c], log)
    yield text(LEFT, top - 6, title, 'class="head"')
    for tick in ticks:
        y = top + HEIGHT * (1 - place(tick))
        yield f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#e5e7eb"/>'
        yield text(LEFT - 6, y + 4, f"{tick:g}", 'text-anchor="end" class="small"')
    stages: dict[str, float] = {}
    for name, curve in curves.items():
        if not name.startswith("jump"):
            for tokens, stage, *_ in curve:
                stages.setdefault(stage, tokens)
    for stage, tokens in stages.items():
        x = LEFT + WIDTH * tokens / last
        yield f'<path d="M{x:.1f} {top}V{top + HEIGHT}" stroke="#9ca3af" stroke-dasharray="2 3"/>'
        yield text(x + 3, top + 11, stage, 'class="small"')
    for name, curve in curves.items():
        points = " ".join(
            f"{LEFT + WIDTH * row[0] / last:.1f},{top + HEIGHT * (1 - place(max(row[column], 1e-4))):.1f}"
            for row in curve
        )
        yield f'<polyline points="{points}" fill="none" stroke="{COLORS[name]}" stroke-width="1.1" stroke-opacity="0.85"/>'
    yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#9ca3af"/>'


def picture(variants: dict[str, Any], title: str) -> str:
    height = TOP + len(PANELS) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + LEGEND} {height}" role="img">',
        f"<title>{title}</title>",
        "<style>text{font:12px sans-serif;fill:#222}.small{font-size:10px}.head{font-weight:bold}</style>",
        f'<rect width="100%" height="{height}" fill="white"/>',
        text(LEFT, 22, title, 'class="head"'),
    ]
    for n, name in enumerate(variants):
        y = TOP + 8 + 18 * n
        parts.append(f'<path d="M{LEFT + WIDTH + 14} {y}h22" stroke="{COLORS[name]}" stroke-width="3"/>')
        parts.append(text(LEFT + WIDTH + 42, y + 4, name))
    for n, (heading, column, log) in enumerate(PANELS):
        parts += panel(variants, heading, column, log, TOP + n * (HEIGHT + GAP))
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
    args = parser.parse_args()
    with open(args.results) as file:
        variants = json.load(file)["variants"]
    wanted = args.only.split(",") if args.only else list(variants)
    with open(args.svg, "w") as file:
        file.write(picture({name: variants[name] for name in wanted if variants[name]["curve"]}, args.title))


if __name__ == "__main__":
    main()
