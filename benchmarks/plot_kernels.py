"""Bars of `benchmarks/kernels.py --out`: the share of the copy floor that each kernel reaches.

python benchmarks/plot_kernels.py results.json kernels.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

LEFT, TOP, WIDTH, BAR, GAP, HEAD = 150, 64, 460, 13, 16, 22
COLORS = {"ours": "#1f6f8b", "fla": "#c9a227"}
LABELS = {"ours": "ours", "fla": "flash-linear-attention"}


def text(x: float, y: float, content: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{content}</text>'


def bars(cases: dict[str, Any], what: str, floor: str, top: float) -> Iterator[str]:
    """One panel: per case a bar per kernel, from 0 to 100 % of the floor."""
    for name, case in cases.items():
        yield text(LEFT - 8, top + BAR + 3, name, 'text-anchor="end"')
        for row, (who, color) in enumerate((w, c) for w, c in COLORS.items() if w in case):
            result, y = case[who][what], top + row * BAR
            share = 0.0 if result.get("oom") else case[floor] / result["ms"]
            label = "out of memory" if result.get("oom") else f"{share:.0%}, {result['ms']:.2f} ms"
            yield f'<rect x="{LEFT}" y="{y}" width="{share * WIDTH:.1f}" height="{BAR - 2}" fill="{color}"/>'
            yield text(LEFT + share * WIDTH + 5, y + BAR - 3, label, 'class="small"')
        top += len(COLORS) * BAR + GAP


def picture(results: dict[str, Any]) -> str:
    cases = results["cases"]
    panel = len(cases) * (len(COLORS) * BAR + GAP) + HEAD + GAP
    height = TOP + 2 * panel + 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height}" role="img">',
        "<title>Lightning attention: share of the copy floor</title>",
        "<style>text{font:12px sans-serif;fill:#222}.small{font-size:10px}.head{font-weight:bold;font-size:13px}</style>",
        f'<rect width="100%" height="{height}" fill="white"/>',
        text(LEFT, 20, f"Lightning attention, bf16, head_dim 128: {results['device']}", 'class="head"'),
    ]
    for n, (who, color) in enumerate(COLORS.items()):
        parts.append(f'<rect x="{LEFT + 70 * n}" y="32" width="10" height="10" fill="{color}"/>')
        parts.append(text(LEFT + 15 + 70 * n, 41, LABELS[who]))
    heads = {"forward": "forward", "both": "forward + backward"}
    for n, (what, floor) in enumerate((("forward", "floor_forward_ms"), ("both", "floor_both_ms"))):
        top = TOP + n * panel
        parts.append(text(LEFT, top + 10, f"{heads[what]}: time of a copy of the same bytes / time", 'class="head"'))
        for percent in range(0, 101, 25):
            x = LEFT + WIDTH * percent / 100
            parts.append(f'<path d="M{x} {top + HEAD - 4}V{top + panel - 2 * GAP}" stroke="#ddd"/>')
            parts.append(text(x, top + panel - GAP - 3, f"{percent} %", 'text-anchor="middle" class="small"'))
        parts += bars(cases, what, floor, top + HEAD)
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="what benchmarks/kernels.py --out wrote")
    parser.add_argument("svg", help="the picture to write")
    args = parser.parse_args()
    with open(args.results) as file:
        results = json.load(file)
    with open(args.svg, "w") as file:
        file.write(picture(results))


if __name__ == "__main__":
    main()
