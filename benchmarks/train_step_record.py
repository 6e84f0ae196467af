"""The record of a run of ``train_step.py --json``: what the log shows and the tests of ``m1 plan`` compare with.

    python benchmarks/train_step_record.py RUN.json docs/figures/train-step-h200.json   # also prints the log's tables

Kernels by name, single losses and paths are excluded.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

CASE = (
    "peer", "rows", "tokens", "status", "stage", "recompute", "documents", "median_ms", "ms", "first_pass_ms",
    "tokens_per_s", "mfu", "peak_gib", "first_loss", "first_grad_norm",
)  # fmt: skip
PEERS = ("ours", "baseline", "transformers")


def rounded(value: Any) -> Any:
    """Six digits are more than a clock knows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return {k: rounded(x) for k, x in value.items()} if isinstance(value, dict) else value


def record(run: dict[str, Any]) -> dict[str, Any]:
    """The run without its bulk."""
    cases = []
    for case in run["cases"]:
        kept = {key: case[key] for key in CASE if key in case}
        if profile := case.get("profile"):
            kept["profile"] = {key: value for key, value in profile.items() if key != "kernels"}
        cases.append(rounded(kept))
    command = re.sub(r" --json \S+", "", re.sub(r"--data \S+", "--data DATA", run["command"]))
    return {**run, "command": command, "cases": cases}


def tables(run: dict[str, Any]) -> list[str]:
    """Markdown: peers beside each other, then the groups of each profile of ours."""
    found = {(c["peer"], c["rows"], c["tokens"]): c for c in run["cases"] if c.get("median_ms")}
    lines = [
        "| tokens | rows | ours: tokens/s | MFU | GiB | baseline: tokens/s | MFU | GiB | transformers | / baseline "
        "| / transformers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows, tokens in sorted({key[1:] for key in found}, key=lambda key: (key[1], key[0])):
        ours, *others = (found.get((peer, rows, tokens)) for peer in PEERS)
        if ours is None:
            continue
        cells = [_cell(ours), _cell(others[0]), f"{others[1]['tokens_per_s']:,.0f}" if others[1] else ""]
        ratios = [f"{x['median_ms'] / ours['median_ms']:.2f}" if x else "" for x in others]
        kept = "" if ours.get("recompute") else ", kept"
        what = f"{documents(ours)}{kept}"
        lines.append(f"| {tokens:,} | {rows}, {what} | {' | '.join((*cells, *ratios))} |")
    profiles = [c for c in found.values() if c["peer"] == "ours" and "profile" in c]
    if not profiles:
        return lines
    names = list(profiles[0]["profile"]["groups"])
    names.sort(key=lambda name: -sum(c["profile"]["groups"][name]["ms"] for c in profiles))
    sizes = " | ".join(f"{c['tokens']:,}" for c in profiles)
    lines += ["", f"| ms (share) of a step of ours | {sizes} |", f"|---|{'---|' * len(profiles)}"]
    for name in [*names, "idle"]:
        spent = [
            (c["profile"]["idle_ms"] if name == "idle" else c["profile"]["groups"][name]["ms"], c["profile"]["wall_ms"])
            for c in profiles
        ]
        lines.append(f"| {name} | {' | '.join(f'{ms:,.1f} ({ms / wall:.1%})' for ms, wall in spent)} |")
    walls = " | ".join(f"{c['profile']['wall_ms']:,.1f}" for c in profiles)
    lines.append(f"| step under the profiler | {walls} |")
    return lines


def documents(case: dict[str, Any]) -> str:
    """How many documents a row has."""
    few, many = min(case["documents"]), max(case["documents"])
    return f"{few} document{'s' * (few > 1)}" if few == many else f"{few}-{many} documents"


def _cell(case: dict[str, Any] | None) -> str:
    if case is None:
        return " | | "
    mfu = f"{case['mfu']:.1%}" if case["mfu"] else ""
    return f"{case['tokens_per_s']:,.0f} | {mfu} | {case['peak_gib'] or 0:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what --json wrote")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = record(json.loads(args.run.read_text(encoding="utf-8")))
    cases = ",\n".join(f"  {json.dumps(case)}" for case in found.pop("cases"))
    head = json.dumps(found, indent=1).removesuffix("\n}")
    args.out.write_text(f'{head},\n "cases": [\n{cases}\n ]\n}}\n', encoding="utf-8")
    print("\n".join(tables(json.loads(args.out.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
