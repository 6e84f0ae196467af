"""Where the hours of a run go: five stages through the command line, and what of their wall time is not training.

    python benchmarks/five_stages.py --preset 700m        # one GPU, contexts of 32K to 1M tokens: about 5 minutes
    python benchmarks/five_stages.py --preset tiny        # a CPU, a smoke run: about 1 minute

Runs, in a new folder below ``--dir`` that is removed in the end: ``m1 prepare-data``; ``m1 pretrain --stage 32k`` in a run
directory of its own, killed after its first step (this fills the caches of compiled kernels); ``m1 pretrain --stage all``;
``m1 pretrain --stage 1m``, which loads and verifies a checkpoint and finds nothing to do; ``m1 export``. The text is Python's
standard library, joined and cut into documents of every length. Two GPUs: ``--set parallel.processes=2 --set parallel.context=2
--set parallel.distributed_optimizer=true``.

The figures are those of the run's events (``metrics.jsonl``), and of the clock for what is before and after them. The limits are
for 700m: the rates of a tiny model's small files say little.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from m1_data.spec import BUCKET_EDGES_TOKENS
from m1_stages.config import STAGE_NAMES
from m1_stages.events import Record, read_events
from m1_stages.run_dir import METRICS
from m1cli.pace import wall_time


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained of a preset: so little that all else can be seen, and a stage longer than its checkpoint is written."""

    length_scale: float
    batch_tokens: tuple[int, ...]
    steps: tuple[int, ...]
    chars_per_token: float
    tokens_per_bucket: int
    state_gb: float
    """What a checkpoint needs, roughly."""


SIZES = {
    "tiny": Size(
        length_scale=1 / 256, batch_tokens=(8_192,) * 5, steps=(10, 5, 5, 5, 5), chars_per_token=2.9,
        tokens_per_bucket=100_000, state_gb=0.05,
    ),
    "700m": Size(
        length_scale=1.0, batch_tokens=(131_072, 131_072, 262_144, 524_288, 1_048_576), steps=(50, 40, 20, 8, 3),
        chars_per_token=3.7, tokens_per_bucket=2_000_000, state_gb=10.0,
    ),
}  # fmt: skip
CONFIG = """\
preset = "{preset}"
[run]
dir = "run"
[parallel]
processes = 1
[tokenizer]
train_bytes = 8_000_000
[data]
held_out = 1
[curriculum]
length_scale = {length_scale}
[evaluate]
lengths = [0.25, 1.0]
depths = [0.0, 1.0]
samples = 1
documents = 1
[[data.sources]]
name = "library"
domain = "code"
format = "jsonl"
path = "library.jsonl"
"""
STAGE = """\
[stages.{stage}]
tokens = {tokens}
global_batch_tokens = {batch}
max_epochs = 100
"""


def main() -> None:
    """Run the commands and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(SIZES), default="tiny")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where; a tmpfs, for the rates of memory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every command; repeatable")
    parser.add_argument(
        "--events", type=Path, help="folder that gets a copy of the events and of what the commands print"
    )
    args = parser.parse_args()
    needed, free = (len(STAGE_NAMES) + 1) * SIZES[args.preset].state_gb, shutil.disk_usage(args.dir).free / 1e9
    if free < needed:
        parser.error(f"{args.dir} has {free:.0f} GB free, and {needed:.0f} are needed: give another --dir")
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="five-stages-") as name:
        folder = Path(name)
        try:
            run_all(args.preset, folder, [x for setting in args.set for x in ("--set", setting)])
        finally:
            if args.events is not None:
                args.events.mkdir(parents=True, exist_ok=True)
                for path in (*folder.glob("*.txt"), folder / "run" / METRICS):
                    if path.is_file():
                        shutil.copy(path, args.events)


def run_all(preset: str, folder: Path, settings: list[str]) -> None:
    """Run every command in ``folder``, and print what each tells."""
    write_inputs(preset, folder)
    command(folder, "prepare-data", settings)
    cold_s = first_step(folder, settings)
    print(f"start -> first step done, caches as they were found: {cold_s:.1f} s", flush=True)
    first = read_run(folder, *command(folder, "pretrain --stage all", settings))
    print_stages(first)
    print_limits(first)
    again = read_run(folder, *command(folder, "pretrain --stage 1m", settings))
    load_s, gigabytes = again.stopped["time"] - again.started["time"], first.stages["1m"].saves[-1].gigabytes
    print(
        f"  until the model is built {again.started['time'] - again.began:.1f} s; {wall_time(again.stopped['wall_s'])}"
    )
    print_limit("load and verify a checkpoint", gigabytes / load_s, "GB/s", at_least=2.0)
    began, ended = command(folder, "export --stage 1m", settings)
    print(f"  {ended - began:.1f} s for {size_gb(folder / 'run' / 'export-1m'):.2f} GB", flush=True)


def write_inputs(preset: str, folder: Path) -> None:
    """Write configuration and text: for each length bucket, documents cut out of the joined standard library."""
    size, chosen = SIZES[preset], random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.relative_to(library).parts]
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    chars_per_token = size.length_scale * size.chars_per_token
    lower, documents = BUCKET_EDGES_TOKENS[0] // 16, []
    for upper in (*BUCKET_EDGES_TOKENS, 2 * BUCKET_EDGES_TOKENS[-1]):
        middle = (lower * upper) ** 0.5  # far from both edges: characters are only roughly tokens
        for _ in range(max(3, round(size.tokens_per_bucket / (middle * size.length_scale)))):
            length = round(middle * chosen.uniform(0.9, 1.1) * chars_per_token)
            start = chosen.randrange(max(1, len(text) - length))
            documents.append(json.dumps({"text": text[start : start + length]}) + "\n")
        lower = upper
    chosen.shuffle(documents)
    (folder / "library.jsonl").write_text("".join(documents), encoding="utf-8")
    stages = zip(STAGE_NAMES, size.steps, size.batch_tokens, strict=True)
    (folder / "m1.toml").write_text(
        CONFIG.format(preset=preset, length_scale=size.length_scale)
        + "".join(STAGE.format(stage=stage, tokens=steps * batch, batch=batch) for stage, steps, batch in stages)
    )
    characters = sum(map(len, documents))
    print(
        f"text: {len(documents)} documents, {characters / 1e6:.0f} MB, of {len(paths)} files in {library}", flush=True
    )


def command(folder: Path, arguments: str, settings: Sequence[str]) -> tuple[float, float]:
    """Run ``m1 ARGUMENTS`` in ``folder``; return when it began and when it ended. What it prints goes to a file."""
    began, log = time.time(), folder / f"{arguments.replace(' ', '-')}.txt"
    with log.open("wb") as out:
        code = subprocess.run(m1(arguments, settings), cwd=folder, stdout=out, stderr=subprocess.STDOUT).returncode
    ended = time.time()
    if code:
        raise SystemExit(f"m1 {arguments} ended with exit code {code}:\n{log.read_text(errors='replace')[-6000:]}")
    print(f"$ m1 {arguments}: {ended - began:.1f} s", flush=True)
    return began, ended


def m1(arguments: str, settings: Sequence[str]) -> list[str]:
    """Return the command line."""
    return [sys.executable, "-m", "m1cli", *arguments.split(), *settings]


def first_step(folder: Path, settings: Sequence[str]) -> float:
    """Start ``m1 pretrain`` in a run directory of its own, end it after its first step, and return the seconds until then."""
    began, log = time.time(), folder / "first-step.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            m1("pretrain --stage 32k --set run.dir=first", settings), cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while not (steps := [r for r in read_events(folder / "first" / METRICS) if r["event"] == "StepDone"]):
                if process.poll() is not None:
                    raise SystemExit(f"m1 pretrain ended before its first step:\n{log.read_text(errors='replace')}")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    shutil.rmtree(folder / "first")
    return float(steps[0]["time"]) - began


@dataclass(frozen=True, kw_only=True)
class Save:
    """A checkpoint that was committed."""

    write_s: float
    stall_s: float
    gigabytes: float


@dataclass(kw_only=True)
class Stage:
    """The events of a stage."""

    started: float
    """When it was announced: after the evaluation of the stage before, before its first step."""
    steps: list[Record] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    evaluation_s: float = 0.0

    @property
    def steps_s(self) -> float:
        """Seconds of its steps."""
        return sum(float(step["step_s"]) for step in self.steps)

    @property
    def stall_s(self) -> float:
        """Seconds that training stood still for its checkpoints."""
        return sum(save.stall_s for save in self.saves)


@dataclass(kw_only=True)
class Run:
    """The events of one process."""

    began: float
    ended: float
    started: Record
    stopped: Record
    stages: dict[str, Stage]

    @property
    def outside_s(self) -> float:
        """Seconds of the process outside of steps and evaluation."""
        stages = self.stages.values()
        return self.ended - self.began - sum(stage.steps_s + stage.evaluation_s for stage in stages)


def read_run(folder: Path, began: float, ended: float) -> Run:
    """Read the events of the process that ran from ``began`` to ``ended``."""
    process: dict[str, Record] = {}
    stages: dict[str, Stage] = {}
    for record in read_events(folder / "run" / METRICS):
        kind = record["event"]
        if record["time"] < began:
            continue
        if kind in ("RunStarted", "RunStopped"):
            process[kind] = record
        elif kind == "StageStarted":
            stages[record["stage"]] = Stage(started=record["time"])
        elif kind == "StepDone":
            stages[record["stage"]].steps.append(record)
        elif kind == "StageEvaluated":
            stages[record["stage"]].evaluation_s = record["seconds"]
        elif kind == "CheckpointSaved":
            save = Save(write_s=record["write_s"], stall_s=record["stall_s"], gigabytes=size_gb(Path(record["path"])))
            stages[record["stage"]].saves.append(save)
    return Run(began=began, ended=ended, started=process["RunStarted"], stopped=process["RunStopped"], stages=stages)


def size_gb(folder: Path) -> float:
    """Return the size of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def change_s(stage: Stage, later: Stage) -> float:
    """Seconds from the last step of ``stage`` to the first of ``later``, without its evaluation and the stall of its saves."""
    step = later.steps[0]
    between = step["time"] - step["step_s"] - stage.steps[-1]["time"]
    return float(between) - stage.evaluation_s - stage.stall_s


def print_stages(run: Run) -> None:
    """Print one row for each stage."""
    names = (
        "stage",
        "wall s",
        "steps s",
        "of them first",
        "evaluation s",
        "save stall s",
        "other s",
        "change s",
        "peak GiB",
    )
    print(f"  {names[0]:<6}" + "".join(f"{name:>14}" for name in names[1:]))
    laters = [*list(run.stages.values())[1:], None]
    for (name, stage), later in zip(run.stages.items(), laters, strict=True):
        wall = (later.started if later else run.stopped["time"]) - stage.started
        other = wall - stage.steps_s - stage.evaluation_s - stage.stall_s
        values = [wall, stage.steps_s, stage.steps[0]["step_s"], stage.evaluation_s, stage.stall_s, other]
        values += [change_s(stage, later) if later else float("nan"), max(step["peak_gib"] for step in stage.steps)]
        print(f"  {name:<6}" + "".join(f"{value:>14.2f}" for value in values))
    stages = list(run.stages.values())
    print(f"  start of the process -> first stage announced: {stages[0].started - run.began:.1f} s")
    print(f"  last event -> end of the process: {run.ended - run.stopped['time']:.1f} s")
    print(f"  as the run counts it: {wall_time(run.stopped['wall_s'])}")


def print_limits(run: Run) -> None:
    """Print what must hold of the run, with its limits."""
    stages = list(run.stages.values())
    saves = [save for stage in stages for save in stage.saves]
    changes = [change_s(stage, later) for stage, later in pairwise(stages)]
    print_limit("everything outside of steps and evaluation", run.outside_s, "s", at_most=45.0)
    print_limit(
        f"longest stall for a checkpoint of {saves[0].gigabytes:.2f} GB",
        max(s.stall_s for s in saves),
        "s",
        at_most=1.5,
    )
    slowest = min(save.gigabytes / (save.stall_s + save.write_s) for save in saves)
    print_limit("slowest checkpoint: copied, written, committed", slowest, "GB/s", at_least=1.5)
    print_limit("longest change of stages", max(changes), "s", at_most=3.0)
    first = stages[0].steps[0]
    print_limit("start of the process -> first step done, warm", first["time"] - run.began, "s", at_most=20.0)


def print_limit(what: str, value: float, unit: str, *, at_most: float = math.inf, at_least: float = -math.inf) -> None:
    """Print a value, its limit, and whether it holds."""
    limit = f"at most {at_most:g}" if at_most < math.inf else f"at least {at_least:g}"
    holds = "ok" if at_least <= value <= at_most else "MISSED"
    print(f"  {what:<60}{value:>9.2f} {unit:<5}{limit:>14} {unit:<5}{holds}", flush=True)


if __name__ == "__main__":
    main()
