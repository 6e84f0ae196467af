"""What the runs of ``length_extension.py`` show: summaries of their events, and a table over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from m1_stages.events import read_events
from m1_stages.run_dir import METRICS


def early_late(norms: list[float]) -> float:
    third = max(1, len(norms) // 3)
    logs = [math.log(max(n, 1e-30)) for n in norms]
    return math.exp((sum(logs[:third]) - sum(logs[-third:])) / third)


def summary(folder: Path) -> dict[str, Any]:
    """What a variant's events say, small enough to keep."""
    events = list(read_events(folder / "run" / METRICS))
    steps = [e for e in events if e["event"] == "StepDone"]
    later = [e for e in steps if e["stage"] != "32k"]
    before = [e["grad_norm"] for e in steps if e["stage"] == "32k"][-50:]
    usual = median(before) if before else 0.0
    evaluated = [e for e in events if e["event"] == "StageEvaluated"]
    end = json.loads((folder / "end.json").read_text()) if (folder / "end.json").exists() else {"error": "cut off"}
    thin = max(1, len(steps) // 400)
    return {
        "end": end,
        "tokens": steps[-1]["tokens_seen"] if steps else 0,
        "final_loss": median(e["loss"] for e in later[-20:]) if later else None,
        "largest_loss": max((e["loss"] for e in later), default=None),
        "norm_before": usual,
        "largest_norm_over_usual": max((e["grad_norm"] for e in later), default=0.0) / usual if usual else None,
        "largest_layer_over_usual": _largest_layer(steps),
        "guard": [
            {k: e[k] for k in ("stage", "step", "action", "ramp", "reason", "series", "z")}
            for e in events if e["event"] == "GuardNoticed" and e["action"] != "apply"
        ],
        "holds": sum(e["event"] == "GuardNoticed" and e["ramp"] == "hold" for e in events),
        "ramps": {e["stage"]: e["ramp_progress"] for e in events if e["event"] == "StageFinished"},
        "recall": {e["stage"]: e["recall"] for e in evaluated},
        "map": evaluated[-1]["needles"] if evaluated else None,
        "positions": evaluated[-1]["positions"] if evaluated else None,
        "curve": [
            [e["tokens_seen"], e["stage"], e["loss"], e["grad_norm"], early_late(e["layer_grad_norms"]), e["ramp_progress"]]
            for n, e in enumerate(steps) if n % thin == 0 or e["grad_norm"] > 3 * usual > 0
        ],
    }  # fmt: skip


def _largest_layer(steps: list[dict[str, Any]]) -> list[float] | None:
    """Per layer: largest norm after the first stage over the median of its last 50 steps."""
    first = [e["layer_grad_norms"] for e in steps if e["stage"] == "32k"][-50:]
    later = [e["layer_grad_norms"] for e in steps if e["stage"] != "32k"]
    if not first or not later:
        return None
    return [max(e[n] for e in later) / median(e[n] for e in first) for n in range(len(first[0]))]


def over_seeds(runs: dict[str, Any], value: Callable[[dict[str, Any]], float | None], form: str = ".2f") -> str:
    """Mean over the seeds, and the range where there are several."""
    seen = [v for v in map(value, runs.values()) if v is not None]
    if not seen:
        return "-"
    both = f" ({min(seen):{form}} to {max(seen):{form}})" if len(seen) > 1 else ""
    return f"{sum(seen) / len(seen):{form}}{both}"


def last_recall(run: dict[str, Any]) -> float | None:
    return None if run["map"] is None else sum(map(sum, run["map"]["recall"])) / sum(map(len, run["map"]["recall"]))


def table(results: dict[str, Any]) -> str:
    rows = [
        "| variant | end | loss, last 20 steps | largest loss | largest norm / usual | of a layer / its usual | held, dropped | "
        "recall after the first stage | at the end |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for name, runs in results.items():
        ends = sorted(
            {
                "done" if r["end"].get("exit_code") == 0 else f"exit {r['end'].get('exit_code', '?')}"
                for r in runs.values()
            }
        )
        drops = " ".join(f"{r['holds']}, {sum(g['action'] != 'apply' for g in r['guard'])};" for r in runs.values())
        rows.append(
            f"| {name} | {', '.join(ends)} | {over_seeds(runs, lambda r: r['final_loss'])} | "
            f"{over_seeds(runs, lambda r: r['largest_loss'])} | "
            f"{over_seeds(runs, lambda r: r['largest_norm_over_usual'], '.1f')} | "
            f"{over_seeds(runs, lambda r: max(r['largest_layer_over_usual'] or [0.0]), '.1f')} | {drops.rstrip(';')} | "
            f"{over_seeds(runs, lambda r: r['recall'].get('32k'))} | {over_seeds(runs, last_recall)} |"
        )
    return "\n".join(rows)


def collect(work: Path, variants: Iterable[str], curves_of: int) -> dict[str, Any]:
    """Summaries of every variant and seed that was run; curves of one seed only."""
    results: dict[str, Any] = {}
    for name in variants:
        for folder in sorted(work.glob(f"{name}-*")):
            seed = folder.name.removeprefix(f"{name}-")
            if seed.isdigit() and (folder / "run" / METRICS).exists():
                seen = summary(folder)
                if int(seed) != curves_of:
                    del seen["curve"]
                results.setdefault(name, {})[seed] = seen
    return results
