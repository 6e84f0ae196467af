"""Experiments on extending the context: what explodes, what does not, and what is learned at long range.

    python benchmarks/length_extension.py prepare CORPUS WORK [--size small]
    python benchmarks/length_extension.py run WORK [--size small] [--only NAME,NAME] [--at-once 4]
    python benchmarks/length_extension.py table WORK                # what was seen, as Markdown

Two sizes: ``tiny`` (a CPU: contexts of 128 to 4,096 tokens) and ``small`` (a GPU: 1,024 to 32,768, 29M parameters).
CORPUS: ``*.jsonl.zst`` files named DOMAIN_*; 30 % of what is trained on are documents that hide keys and ask for them. Every
variant trains the same tokens from the same initial weights and is evaluated at the longest context. All of them run in
processes of their own; ``WORK/NAME/`` holds configuration, events and checkpoints. Pictures: ``plot_length_extension.py``.

Variants, by the experiment they belong to:
  1  jump*           32K to 1M in one step, the rates of decay in one step too, the guard off; at 1, 3 and 10 times the learning
                     rate, twice as deep, with half of the batch: ways to make it explode
  2  fixed           five stages, released rates throughout
  3  relax, stretch  five stages, rates on a ramp that follows the clock
  4  relax-guard, stretch-guard   the same, the ramp coupled to the guard
  5  bad, bad-guard  relax with four bad batches in each later stage (random tokens), the guard off and on
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from m1_stages.config import STAGE_NAMES

SOURCES = """
[[data.sources]]
name = "needles"
domain = "reasoning"
format = "needles"
max_docs = {needles}
"""
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "scale": 1 / 256, "batch": 4_096, "lr": 2e-3, "steps": (110, 24, 24, 24, 24), "needles": 4_000, "samples": 2,
        "micro": (64, 16, 8, 4, 2), "model": {}, "precision": "fp32",
    },
    "small": {
        "scale": 1 / 32, "batch": 32_768, "lr": 1e-3, "steps": (500, 100, 80, 80, 80), "needles": 34_000, "samples": 2,
        "micro": (32, 8, 4, 2, 1), "precision": "bf16",
        "model": {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "rotary_dim": 32, "num_kv_heads": 2,
                  "num_experts": 8, "expert_hidden_size": 512},
    },
}  # fmt: skip
JUMP = {"stages": "jump", "decay": "relax", "ramp_share": 0.0, "guard": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "jump": JUMP,
    "jump-lr3": JUMP | {"lr": 3.0},
    "jump-lr10": JUMP | {"lr": 10.0},
    "jump-deep": JUMP | {"lr": 3.0, "layers": 16},
    "jump-batch": JUMP | {"lr": 3.0, "batch": 2},
    "fixed": {"decay": "fixed", "guard": False},
    "relax": {"decay": "relax", "guard": False},
    "stretch": {"decay": "stretch", "guard": False},
    "relax-guard": {"decay": "relax", "guard": True},
    "stretch-guard": {"decay": "stretch", "guard": True},
    "bad": {"decay": "relax", "guard": False, "bad": True},
    "bad-guard": {"decay": "relax", "guard": True, "bad": True},
}
BAD_STEPS = (0.5, 0.55, 0.7, 0.9)
"""Places of the bad batches in every stage but the first."""


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value)


def configuration(size: str, variant: dict[str, Any]) -> str:
    """The whole m1.toml of a variant."""
    s, stretch_out = SIZES[size], variant.get("batch", 1)
    lr, batch = s["lr"] * variant.get("lr", 1.0), s["batch"] // stretch_out
    jump, guard = variant.get("stages") == "jump", variant.get("guard", True)
    model = s["model"] | ({"num_layers": variant["layers"]} if "layers" in variant else {})
    sections: dict[str, dict[str, Any]] = {
        "model": model,
        "tokenizer": {"vocab_size": 2048},
        "data": {"out": "../data"},
        "run": {"precision": s["precision"], "save_every_steps": 50, "threads": 1},
        "curriculum": {
            "length_scale": s["scale"], "decay": variant.get("decay", "relax"), "relax_exponent": 0.5,
            "stretch_exponent": [0.25], "decay_ramp_share": variant.get("ramp_share", 0.4),
        },
        "guard": {"enabled": guard, "min_steps": 8, "ramp": "guarded" if guard else "clock"},
        "evaluate": {"samples": s["samples"], "lengths": [0.125, 0.25, 0.5, 1.0], "depths": [0.0, 0.25, 0.5, 0.75, 1.0]},
    }  # fmt: skip
    mixes = {"32k": (1, 0, 0), "128k": (0.3, 0.7, 0), "256k": (0.35, 0.45, 0.2), "512k": (0.35, 0.35, 0.3),
             "1m": (0.3, 0.3, 0.4)}  # fmt: skip
    for n, stage in enumerate(STAGE_NAMES):
        steps, micro, mix = s["steps"][n] * stretch_out, s["micro"][n], mixes[stage]
        rate = lr if n else s["lr"]
        values: dict[str, Any] = {
            "tokens": steps * batch, "global_batch_tokens": batch, "lr_peak": rate, "lr_final": rate / 2,
            "lr_warmup_share": 0.0 if n else 0.1, "max_epochs": 100.0, "long_qa_share": 0.0, "micro_batch_rows": micro,
            "domains": {"reasoning": 0.3, "stem": 0.25, "code": 0.25, "general": 0.2},
        }  # fmt: skip
        if jump and n == 1:
            values |= {"context_tokens": 2**20, "rope_base": 1e7, "tokens": sum(s["steps"][1:]) * stretch_out * batch}
            values["micro_batch_rows"], mix = s["micro"][-1], mixes["1m"]
        values |= dict(zip(("short", "medium", "long"), mix, strict=True))
        sections[f"stages.{stage}"] = values
    lines = ['preset = "tiny"']
    for name, section in sections.items():
        lines.append(f"[{name}]")
        for key, value in section.items():
            inner = ", ".join(f"{k} = {v}" for k, v in value.items()) if isinstance(value, dict) else ""
            lines.append(f"{key} = {{ {inner} }}" if inner else f"{key} = {toml(value)}")
    return "\n".join(lines) + "\n"


def prepare(corpus: Path, work: Path, size: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    tables = [
        f'[[data.sources]]\nname = "{domain}"\ndomain = "{domain}"\nformat = "jsonl"\npath = "{corpus.resolve()}/{domain}_*"\n'
        for domain in ("stem", "code", "general")
    ]
    text = configuration(size, VARIANTS["relax"]).replace('out = "../data"', 'out = "data"')
    text += "\n".join(tables) + SOURCES.format(needles=SIZES[size]["needles"])
    (work / "m1.toml").write_text(text)
    subprocess.run([sys.executable, "-m", "m1cli", "prepare-data", "--config", str(work / "m1.toml")], check=True)


def run_variant(work: Path, size: str, name: str) -> int:
    """Train one variant in this process; its exit code."""
    from m1_data.errors import M1Error
    from m1_stages.configload import load_config
    from m1_stages.engine import pretrain
    from m1_stages.engine.events import Event, StepDone

    variant, folder = VARIANTS[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m1.toml").write_text(configuration(size, variant))
    resolved = load_config(folder / "m1.toml")
    if variant.get("bad"):
        spoil_batches(SIZES[size])
    stages = ["32k", "128k"] if variant.get("stages") == "jump" else list(STAGE_NAMES)
    began = time.time()

    def progress(event: Event) -> None:
        if isinstance(event, StepDone) and event.step % 50 == 0:
            print(f"{name} {event.stage} {event.step} loss {event.loss:.3f} norm {event.grad_norm:.2f} "
                  f"{time.time() - began:.0f} s", flush=True)  # fmt: skip

    end: dict[str, Any] = {"exit_code": 0, "error": ""}
    try:
        pretrain.run(resolved, stages, [progress])
    except M1Error as error:
        end = {"exit_code": error.exit_code, "error": str(error)}
        print(f"{name}: {error}", flush=True)
    (folder / "end.json").write_text(json.dumps(end | {"seconds": time.time() - began}))
    return 0


def spoil_batches(size: dict[str, Any]) -> None:
    """Some steps of every later stage see random tokens instead of text."""
    import torch

    from m1_data.loader import PackedBatch, PackedDataset

    original = PackedDataset.batch

    def batch(self: PackedDataset, row_ids: list[int]) -> PackedBatch:
        good = original(self, row_ids)
        rows = size["batch"] // round(len(good.tokens[0]) / len(row_ids))
        steps = len(self) // rows
        stages = [n for n in size["steps"][1:] if n == steps]
        if not stages or row_ids[0] // rows not in {round(share * steps) for share in BAD_STEPS}:
            return good
        drawn = torch.Generator().manual_seed(row_ids[0])
        noise = torch.randint(0, 2048, good.tokens.shape, generator=drawn)
        return dataclasses.replace(good, tokens=noise, labels=noise.roll(-1, 1))

    PackedDataset.batch = batch  # type: ignore[method-assign]


def run(work: Path, size: str, names: list[str], at_once: int, budget_s: float) -> None:
    """Train variants in processes of their own, ``at_once`` at a time."""
    waiting, running, began = list(names), {}, time.time()
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            command = [sys.executable, __file__, "variant", str(work), "--size", size, "--only", name]
            env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
            running[name] = subprocess.Popen(command, env=env)
        time.sleep(0.5)
        late = time.time() - began > budget_s
        for name, process in list(running.items()):
            if late and process.poll() is None:
                print(f"{name}: stopped by the budget", flush=True)
                process.terminate()  # saves and leaves
                process.wait()
            if process.poll() is not None:
                del running[name]
        if late:
            waiting.clear()


def read_events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def early_late(norms: list[float]) -> float:
    third = max(1, len(norms) // 3)
    logs = [math.log(max(n, 1e-30)) for n in norms]
    return math.exp((sum(logs[:third]) - sum(logs[-third:])) / third)


def summary(folder: Path) -> dict[str, Any]:
    """What a variant's events say, small enough to keep."""
    events = read_events(folder)
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


def table(results: dict[str, Any]) -> str:
    rows = [
        "| variant | end | loss, last 20 steps | largest loss | norm before, largest over it | layer, largest over its usual "
        "| held, dropped | recall after each stage | recall at the longest, by depth |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for name, r in results.items():
        layer = max(r["largest_layer_over_usual"] or [0.0])
        drops = sum(g["action"] in ("skip", "roll_back") for g in r["guard"])
        recall = " ".join(f"{v:.2f}" for v in r["recall"].values() if v is not None)
        depth = " ".join(f"{v:.2f}" for v in r["map"]["recall"][-1]) if r["map"] else ""
        final = "-" if r["final_loss"] is None else f"{r['final_loss']:.3f}"
        largest = "-" if r["largest_loss"] is None else f"{r['largest_loss']:.2f}"
        end = f"exit {r['end'].get('exit_code')}" if r["end"].get("exit_code") else r["end"].get("error") or "done"
        rows.append(
            f"| {name} | {end} | {final} | {largest} | {r['norm_before']:.2f}, {r['largest_norm_over_usual'] or 0:.1f}x | "
            f"{layer:.1f}x | {r['holds']}, {drops} | {recall} | {depth} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "variant", "table"))
    parser.add_argument("paths", nargs="+", type=Path, help="CORPUS WORK for prepare, WORK for the others")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    parser.add_argument("--at-once", type=int, default=1, help="processes at a time")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds after which variants are stopped")
    args = parser.parse_args()
    work, names = args.paths[-1], args.only.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))}")
    if args.command == "prepare":
        prepare(args.paths[0], work, args.size)
    elif args.command == "variant":
        sys.exit(run_variant(work, args.size, names[0]))
    else:
        if args.command == "run":
            run(work, args.size, names, args.at_once, args.budget_s)
        results = {name: summary(work / name) for name in VARIANTS if (work / name / "run" / "metrics.jsonl").exists()}
        (work / "results.json").write_text(json.dumps({"size": args.size, "variants": results}))
        print(table(results))


if __name__ == "__main__":
    main()
