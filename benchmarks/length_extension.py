"""Experiments on extending the context: what explodes, what does not, and what is learned at long range.

    python benchmarks/length_extension.py prepare CORPUS WORK [--size small]
    python benchmarks/length_extension.py run WORK [--size small] [--only NAME,NAME] [--seeds 1,2,3] [--at-once 4] [--gpus 1]
    python benchmarks/length_extension.py table WORK                # what was seen, as Markdown

Two sizes: ``tiny`` (a CPU: contexts of 128 to 4,096 tokens) and ``small`` (GPUs: 1,024 to 32,768, 16 layers, 61M parameters).
CORPUS: ``*.jsonl.zst`` files named DOMAIN_*; half of what is trained on are documents that hide keys and ask for them. Every
variant trains the same tokens; those that do not differ in the first stage share it: it is trained once for each seed and way of
decay (``WORK/base-*``). Each is evaluated after each stage. All run in processes of their own; ``WORK/NAME-SEED/`` holds
configuration, events and the last checkpoints. Pictures: ``plot_length_extension.py``.

Variants, by the experiment they belong to:
  1  jump*           32K to 1M in one step, the rates of decay in one step too, the guard off; at 1, 3 and 10 times the learning
                     rate, twice as deep, with half of the batch: ways to make it explode
  2  fixed           five stages, released rates throughout
  3  relax, stretch  five stages, rates on a ramp that follows the clock
  4  *-guard         the same three, with the guard, to which the ramp is coupled
  5  bad, bad-guard  relax with four bad batches in each later stage (random tokens), the guard off and on; bad-fixed*: the
                     same with released rates
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from length_extension_results import collect, table

from m1_stages.config import STAGE_NAMES
from m1_stages.run_dir import CHECKPOINTS

SOURCES = """
[[data.sources]]
name = "needles"
domain = "reasoning"
format = "needles"
max_docs = {needles}
"""
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "scale": 1 / 256, "batch": 4_096, "lr_first": 2e-3, "lr": 2e-3, "steps": (110, 40, 40, 40, 40), "needles": 4_000,
        "samples": 2, "micro": (64, 16, 8, 4, 2), "model": {}, "precision": "fp32",
    },
    "small": {
        "scale": 1 / 32, "batch": 32_768, "lr_first": 2e-3, "lr": 1e-3, "steps": (2_800, 150, 120, 120, 120), "needles": 60_000,
        "samples": 6, "micro": (32, 8, 4, 2, 1), "precision": "bf16",
        "model": {"hidden_size": 256, "num_layers": 16, "num_heads": 8, "head_dim": 64, "rotary_dim": 32, "num_kv_heads": 4,
                  "num_experts": 8, "expert_hidden_size": 512},
    },
}  # fmt: skip
JUMP = {"stages": "jump", "decay": "relax", "ramp_share": 0.0, "guard": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "jump": JUMP,
    "jump-lr3": JUMP | {"lr": 3.0},
    "jump-lr10": JUMP | {"lr": 10.0},
    "jump-deep": JUMP | {"lr": 3.0, "deep": True},
    "jump-batch": JUMP | {"lr": 3.0, "batch": 2},
    "fixed": {"decay": "fixed", "guard": False},
    "relax": {"decay": "relax", "guard": False},
    "stretch": {"decay": "stretch", "guard": False},
    "fixed-guard": {"decay": "fixed", "guard": True},
    "relax-guard": {"decay": "relax", "guard": True},
    "stretch-guard": {"decay": "stretch", "guard": True},
    "bad": {"decay": "relax", "guard": False, "bad": True},
    "bad-guard": {"decay": "relax", "guard": True, "bad": True},
    "bad-fixed": {"decay": "fixed", "guard": False, "bad": True},
    "bad-fixed-guard": {"decay": "fixed", "guard": True, "bad": True},
}
BAD_STEPS = (0.5, 0.55, 0.7, 0.9)
"""Places of the bad batches in every stage but the first."""


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value)


def base_of(name: str) -> str:
    """The first stage that a variant continues."""
    variant = VARIANTS[name]
    return "base-" + ("relax" if variant["decay"] == "relax" else "released") + ("-deep" if variant.get("deep") else "")


def configuration(size: str, variant: dict[str, Any], seed: int) -> str:
    """The whole m1.toml of a variant."""
    s, halved = SIZES[size], variant.get("batch", 1)
    lr, batch = s["lr"] * variant.get("lr", 1.0), s["batch"] // halved
    jump, guard, model = variant.get("stages") == "jump", variant.get("guard", True), dict(s["model"])
    if variant.get("deep"):
        model["num_layers"] = 2 * model.get("num_layers", 8)
    sections: dict[str, dict[str, Any]] = {
        "model": model,
        "tokenizer": {"vocab_size": 2048},
        "data": {"out": "../data"},
        "run": {"precision": s["precision"], "save_every_steps": 100_000, "threads": 1, "seed": seed},
        "curriculum": {
            "length_scale": s["scale"], "decay": variant["decay"], "relax_exponent": 0.25,
            "stretch_exponent": [0.25], "decay_ramp_share": variant.get("ramp_share", 0.4),
        },
        "guard": {"enabled": guard, "ramp": "guarded" if guard else "clock"},
        "evaluate": {"samples": s["samples"], "lengths": [0.125, 0.25, 0.5, 1.0], "depths": [0.0, 0.25, 0.5, 0.75, 1.0]},
    }  # fmt: skip
    mixes = {"32k": (1, 0, 0), "128k": (0.3, 0.7, 0), "256k": (0.35, 0.45, 0.2), "512k": (0.35, 0.35, 0.3),
             "1m": (0.3, 0.3, 0.4)}  # fmt: skip
    for n, stage in enumerate(STAGE_NAMES):
        steps, micro, mix = s["steps"][n] * (halved if n else 1), s["micro"][n], mixes[stage]
        rate, tokens = (lr, batch) if n else (s["lr_first"], s["batch"])
        values: dict[str, Any] = {
            "tokens": steps * tokens, "global_batch_tokens": tokens, "lr_peak": rate, "lr_final": rate / 2,
            "lr_warmup_share": 0.0 if n else 0.1, "max_epochs": 100.0, "long_qa_share": 0.0, "micro_batch_rows": micro,
            "domains": {"reasoning": 0.5, "stem": 0.18, "code": 0.18, "general": 0.14},
        }  # fmt: skip
        if jump and n == 1:
            values |= {"context_tokens": 2**20, "rope_base": 1e7, "tokens": sum(s["steps"][1:]) * s["batch"]}
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
    text = configuration(size, VARIANTS["relax"], 1).replace('out = "../data"', 'out = "data"')
    text += "\n".join(tables) + SOURCES.format(needles=SIZES[size]["needles"])
    (work / "m1.toml").write_text(text)
    subprocess.run([sys.executable, "-m", "m1cli", "prepare-data", "--config", str(work / "m1.toml")], check=True)


def run_variant(work: Path, size: str, name: str, seed: int) -> int:
    """Train one variant, or the first stage of some, in this process."""
    from m1_stages.config.load import load_config
    from m1_stages.errors import M1Error
    from m1_stages.events import Event, StageFinished, StepDone
    from m1_stages.jobs import pretrain

    is_base, folder = name.startswith("base"), work / f"{name}-{seed}"
    example = next(v for v in VARIANTS if base_of(v) == name) if is_base else name
    variant = VARIANTS[example] | ({"guard": True} if is_base else {})
    if not is_base:  # a first stage that was cut off goes on
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m1.toml").write_text(configuration(size, variant, seed))
    resolved, later = load_config(folder / "m1.toml"), list(STAGE_NAMES[1:])
    if not is_base:  # checkpoints are never written to, so a link is as good as a copy
        shutil.copytree(work / f"{base_of(name)}-{seed}" / "run", folder / "run", copy_function=_link_checkpoints)
    if variant.get("bad"):
        spoil_batches(SIZES[size])
    stages = ["32k"] if is_base else ["128k"] if variant.get("stages") == "jump" else later
    began = time.time()

    def progress(event: Event) -> None:
        if isinstance(event, StepDone) and event.step % 50 == 0:
            print(f"{folder.name} {event.stage} {event.step} loss {event.loss:.3f} norm {event.grad_norm:.2f} "
                  f"{time.time() - began:.0f} s", flush=True)  # fmt: skip
        if isinstance(event, StageFinished):
            for old in sorted((folder / "run" / CHECKPOINTS).glob("step_*"))[:-2]:  # disks are small
                shutil.rmtree(old)

    end: dict[str, Any] = {"exit_code": 0, "error": ""}
    try:
        pretrain.run(resolved, stages, [progress])
    except M1Error as error:
        end = {"exit_code": error.exit_code, "error": str(error)}
        print(f"{folder.name}: {error}", flush=True)
    (folder / "end.json").write_text(json.dumps(end | {"seconds": time.time() - began}))
    return 0


def _link_checkpoints(source: str, target: str) -> str:
    if "/checkpoints/" in source:
        os.link(source, target)
        return target
    return shutil.copy2(source, target)


def spoil_batches(size: dict[str, Any]) -> None:
    """Some steps of every later stage see random tokens instead of text."""
    import torch

    from m1_data.sampling.loader import PackedBatch, PackedDataset

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


def run(work: Path, size: str, names: list[str], seeds: list[int], at_once: int, gpus: int, budget_s: float) -> None:
    """Train first stages, then variants, in processes of their own, ``at_once`` at a time, on GPUs in turn."""
    until = time.time() + budget_s
    bases = dict.fromkeys(name if name.startswith("base") else base_of(name) for name in names)
    first = [(base, seed) for seed in seeds for base in bases if not finished(work, base, seed)]
    for group in (first, [(name, seed) for seed in seeds for name in names if name in VARIANTS]):
        waiting, running, started = list(group), {}, 0
        while waiting or running:
            while waiting and len(running) < at_once:
                name, seed = waiting.pop(0)
                command = [
                    sys.executable,
                    __file__,
                    "variant",
                    str(work),
                    "--size",
                    size,
                    "--only",
                    name,
                    "--seeds",
                    str(seed),
                ]
                env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
                if gpus:
                    env["CUDA_VISIBLE_DEVICES"] = str(started % gpus)
                running[name, seed] = subprocess.Popen(command, env=env)
                started += 1
            time.sleep(0.5)
            late = time.time() > until
            for which, process in list(running.items()):
                if late and process.poll() is None:
                    print(f"{which}: stopped by the budget", flush=True)
                    process.terminate()  # saves and leaves
                    process.wait()
                if process.poll() is not None:
                    del running[which]
            if late:
                return


def finished(work: Path, name: str, seed: int) -> bool:
    end = work / f"{name}-{seed}" / "end.json"
    return end.exists() and json.loads(end.read_text())["exit_code"] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "variant", "table"))
    parser.add_argument("paths", nargs="+", type=Path, help="CORPUS WORK for prepare, WORK for the others")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas; base-*: first stages alone")
    parser.add_argument("--seeds", default="1", help="seeds of weights and data order, with commas")
    parser.add_argument("--at-once", type=int, default=1, help="processes at a time")
    parser.add_argument("--gpus", type=int, default=0, help="spread processes over so many GPUs")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds after which variants are stopped")
    args = parser.parse_args()
    work, names, seeds = args.paths[-1], args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    known = {*VARIANTS, *map(base_of, VARIANTS)}
    if unknown := set(names) - known:
        parser.error(f"no variant {', '.join(sorted(unknown))}")
    if args.command == "prepare":
        prepare(args.paths[0], work, args.size)
    elif args.command == "variant":
        sys.exit(run_variant(work, args.size, names[0], seeds[0]))
    else:
        if args.command == "run":
            run(work, args.size, names, seeds, args.at_once, args.gpus, args.budget_s)
        results = collect(work, VARIANTS, curves_of=seeds[0])
        (work / "results.json").write_text(json.dumps({"size": args.size, "variants": results}))
        print(table(results))


if __name__ == "__main__":
    main()
