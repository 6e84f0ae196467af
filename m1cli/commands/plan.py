"""Implements ``m1 plan``: parameters, FLOPs, memory and time of every stage, and the parallel layouts to choose."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from m1_stages.config import PRESETS, Resolved
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError, EnvironmentProblem
from m1_stages.plan.estimate import Compared, Plan, StageEstimate, make_plan
from m1_stages.plan.hardware import gpu_named
from m1_stages.plan.run_measurements import WARM_UP_STEPS
from m1_stages.plan.search import LayoutEstimate
from m1cli.console import console


def plan_command(
    path: Path, preset: str | None, gpus: int | None, gpu: str, overrides: list[str], *, as_json: bool
) -> None:
    """Print the plan.

    Raises:
        ConfigError: the GPU or preset is unknown, or there is no such configuration.
        EnvironmentProblem: a stage fits in no layout; the estimates are printed first.
    """
    known = gpu_named(gpu)
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus is {gpus}", fix="give 1 or more")
    plan = make_plan(resolve(path, preset, overrides), known, gpus)
    if as_json:
        console.print_json(json.dumps(plan.as_dict()))
    else:
        _show(plan)
    if plan.change is not None:
        missing = ", ".join(plan.change.stages)
        raise EnvironmentProblem(plan.change.what, where=f"stages {missing}", fix=plan.change.fix)


def resolve(path: Path, preset: str | None, overrides: list[str]) -> Resolved:
    """Return the configuration of ``path``, or of a bare preset.

    Raises:
        ConfigError: the preset is unknown, or there is no such configuration.
    """
    if preset is None:
        return load_config(path, overrides)
    if preset not in PRESETS:
        hint = difflib.get_close_matches(preset, PRESETS, n=1)
        fix = f"did you mean {hint[0]}?" if hint else f"choose one of {', '.join(PRESETS)}"
        raise ConfigError(f"there is no preset {preset!r}", where="--preset", fix=fix)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "m1.toml"
        bare.write_text(f'preset = "{preset}"\n', encoding="utf-8")
        return load_config(bare, overrides)


def _show(plan: Plan) -> None:
    machine, parameters = plan.machine, plan.parameters
    policy = machine.memory_policy
    precision = "bf16" if policy.bf16 else "fp32"
    recompute = {
        "auto": "activations kept where they fit",
        "always": "activations recomputed",
        "never": "activations kept",
    }
    settings = [precision, recompute[policy.recompute]]
    settings += ["inputs of recomputed layers in host memory"] * policy.offload_activations
    settings += ["optimizer in host memory"] * policy.offload_optimizer
    console.print(
        f"[bold]{plan.preset}[/] on {machine.gpus:,} {machine.gpu.name} ({machine.gpu.memory_gib:.0f} GiB each), "
        f"{', '.join(settings)}: [bold]{_count(parameters.total)}[/] parameters, "
        f"[bold]{_count(parameters.active)}[/] active\n"
    )
    _parameters(plan)
    _flops(plan)
    if any(item.published for item in plan.generation):
        _generation(plan)
    if any(stage.layouts for stage in plan.stages):
        _layouts(plan)
        _memory(plan)
        _time(plan)
    compared = [stage.compared for stage in plan.stages if stage.compared]
    if compared:
        _measured(compared)
    for name, why in plan.not_compared.items():
        console.print(f"[dim]stage {name} of this run is not compared: {why}[/]", soft_wrap=True)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _parameters(plan: Plan) -> None:
    p = plan.parameters
    table = _table("Parameters", "part", ["number", "share", "used by a token"])
    rows = {
        "experts": (p.experts, p.experts_active),
        "lightning attention": (p.lightning, p.lightning),
        "softmax attention": (p.softmax, p.softmax),
        "routers": (p.routers, p.routers),
        "norms": (p.norms, p.norms),
        "embedding": (p.embedding, 0),
        "head": (p.head, 0),
    }
    for name, (number, used) in rows.items():
        table.add_row(f"[dim]{name}[/]", f"{number:,}", f"{number / p.total:.1%}", f"{used:,}" if used else "-")
    table.add_section()
    table.add_row("total", f"{p.total:,}", "", f"{p.active:,}")
    console.print(table)
    console.print("[dim]Embedding and head are not counted as used, as in the published active sizes.[/]\n")


def _flops(plan: Plan) -> None:
    table = _table("FLOPs of training one token (forward and backward)", "", [s.workload.stage for s in plan.stages])
    parts = {
        "attention projections": "projections",
        "experts": "experts",
        "head": "head",
        "softmax attention": "softmax",
        "lightning attention": "lightning",
    }
    for title, name in parts.items():
        table.add_row(f"[dim]{title}[/]", *(_si(getattr(s.flops, name)) for s in plan.stages))
    table.add_section()
    table.add_row("total, one document a row", *(_si(s.flops.total) for s in plan.stages))
    table.add_row("total, documents of the mix", *(_si(s.mix_flops.total) for s in plan.stages))
    table.add_row("per step, one document", *(_si(s.flops.total * s.workload.tokens_per_step) for s in plan.stages))
    table.add_row("[dim]tokens per step[/]", *(_si(s.workload.tokens_per_step) for s in plan.stages))
    console.print(table)
    console.print("[dim]Softmax attention counts the causal half. Recomputation is not counted.[/]\n")


def _generation(plan: Plan) -> None:
    table = _table(
        "FLOPs of generating tokens, compared with DeepSeek-R1 (671B, 37B active)",
        "tokens",
        ["this model", "R1", "ratio", "published", "last token", "R1 absorbed", "ratio"],
    )
    for item in plan.generation:
        below = "<" if item.published == 0.5 else "~"
        table.add_row(
            f"{item.tokens:,}",
            _si(item.ours),
            _si(item.r1),
            f"[bold]{item.ratio:.0%}[/]",
            f"{below} {item.published:.0%}" if item.published else "-",
            f"{item.last_token:.0%}",
            _si(item.r1_absorbed),
            f"{item.ratio_absorbed:.0%}",
        )
    console.print(table)
    console.print(
        "[dim]Sum over t of 2 x active parameters + attention to t tokens. R1: 61 layers x 128 heads x (192 + 128) "
        "channels x 2; absorbed x (576 + 512), as its servers decode. Both counts stay below the published 50%; "
        "the published 25% lies between them, nearest to the cost of the last token.[/]\n"
    )


def _layouts(plan: Plan) -> None:
    table = _table(
        "Fastest layouts that fit",
        "stage",
        ["TP", "PP", "CP", "EP", "ETP", "DP", "micro", "act.", "GiB", "s/step", "tok/s/GPU", "MFU"],
    )
    commands = []
    for stage in plan.stages:
        for number, x in enumerate(stage.layouts, 1):
            mine = x.layout == (stage.configured and stage.configured.layout)
            table.add_row(f"{stage.workload.stage} #{number}{' yours' * mine}", *_layout_cells(x))
            arguments = x.layout.arguments(plan.parallel) or "as configured"
            commands.append(f"[dim]{stage.workload.stage:>5} #{number}[/]  {escape(arguments)}")
        own = stage.configured
        if own and own.layout not in [x.layout for x in stage.layouts]:
            table.add_row(f"[dim]{stage.workload.stage} yours[/]", *_layout_cells(own))
        table.add_section()
    console.print(table)
    console.print(
        "[dim]micro: rows of a forward pass x passes a step. act.: activations kept, recomputed (again), or their inputs in host "
        "memory (run.recompute, run.offload_activations). GiB: of the fullest GPU, red if too much. "
        "tok/s/GPU and MFU: every row one document, nothing counted twice.[/]\n"
    )
    if all(line.endswith("as configured") for line in commands):
        console.print("The layouts are the configured ones.\n")
        return
    for line in commands:
        console.print(line, soft_wrap=True)
    console.print()


def _layout_cells(x: LayoutEstimate) -> list[str]:
    y = x.layout
    pipeline, acts = f"{y.pipeline}x{y.virtual_pipeline}" if y.virtual_pipeline > 1 else y.pipeline, x.activations
    cells = [str(size) for size in (y.tensor, pipeline, y.context, y.expert, y.expert_tensor, y.data)]
    return [
        *cells, f"{x.micro_batch_rows}x{x.micro_batches}", "host" if acts.offload else "again" if acts.recompute else "kept",
        f"{x.memory.needed:,.0f}" if x.fits else f"[red]{x.memory.needed:,.0f}[/]", _seconds(x.time.total),
        f"{x.tokens_per_s_per_gpu:,.0f}", f"{x.mfu:.0%}",
    ]  # fmt: skip


def _parts(
    table: Table,
    stages: list[StageEstimate],
    names: dict[str, str],
    value: Callable[[LayoutEstimate], Any],
    digits: int,
) -> None:
    for title, name in names.items():
        numbers = [getattr(value(stage.layouts[0]), name) for stage in stages]
        if any(round(number, digits) for number in numbers):
            table.add_row(f"[dim]{title}[/]", *(f"{number:,.{digits}f}" if number else "-" for number in numbers))


def _memory(plan: Plan) -> None:
    stages = [stage for stage in plan.stages if stage.layouts]
    table = _table("Memory of the fullest GPU in layout #1, GiB", "", [s.workload.stage for s in stages])
    names = {
        "weights": "weights",
        "gradients, fp32": "gradients",
        "master weights, moments": "optimizer",
        "activations, kept": "activations",
        "one layer's backward": "layer",
        "attention states": "states",
        "keys, tokens of others": "communication",
        "head: a chunk of logits": "head",
        "optimizer temporaries": "update",
        "workspace": "workspace",
    }
    _parts(table, stages, names, lambda x: x.memory, 2)
    table.add_section()
    table.add_row("peak in torch", *(f"{s.layouts[0].memory.peak:,.1f}" for s in stages))
    table.add_row("[dim]driver, NCCL, fragments[/]", *(f"{s.layouts[0].memory.reserve:,.1f}" for s in stages))
    table.add_row("needed", *(f"[bold]{s.layouts[0].memory.needed:,.1f}[/]" for s in stages))
    if any(s.layouts[0].memory.host for s in stages):
        table.add_row("[dim]pinned host memory[/]", *(f"{s.layouts[0].memory.host:,.1f}" for s in stages))
    console.print(table)
    console.print("[dim]Layer, head and optimizer step are not busy together: the peak has the largest of them.[/]\n")


def _time(plan: Plan) -> None:
    stages = [stage for stage in plan.stages if stage.layouts]
    title = "Time of a step in layout #1, seconds, every row one document"
    table = _table(title, "", [s.workload.stage for s in stages])
    names = {
        "attention projections": "projections",
        "experts": "experts",
        "head": "head",
        "softmax attention": "softmax",
        "lightning attention": "lightning",
        "norms, activations, copies": "element_wise",
        "sorting for experts": "moe_index",
        "waiting for Python": "host",
        "optimizer": "optimizer",
        "copies from and to the host": "offload",
        "TP: tokens gathered": "tensor",
        "EP: tokens to experts": "expert",
        "CP: states, keys, values": "context",
        "PP: messages": "pipeline",
        "PP: bubble": "bubble",
        "DP: gradients": "data",
    }
    digits = 2 if max(s.layouts[0].time.total for s in stages) < 60 else 1
    _parts(table, stages, names, lambda x: x.time, digits)
    table.add_section()
    table.add_row("step", *(f"[bold]{_seconds(s.layouts[0].time.total)}[/]" for s in stages))
    table.add_row("step, documents of the mix", *(_seconds(s.layouts[0].mix_time.total) for s in stages))
    table.add_row("[dim]steps[/]", *(f"{s.workload.steps:,}" if s.workload.steps else "-" for s in stages))
    table.add_row("GPU-hours", *(_hours(s.hours(s.layouts[0])) for s in stages))
    table.add_row("GPU-hours, mix", *(_hours(s.hours(s.layouts[0], mix=True)) for s in stages))
    console.print(table)
    console.print("[dim]Nothing overlaps: communication is waited for, as in the trainer.[/]")


def _measured(compared: list[Compared]) -> None:
    table = _table(
        "Measured in this run",
        "stage",
        ["steps", "s/step", "estimate", "off by", "with mix", "peak GiB", "estimate", "off by"],
    )
    for x in compared:
        table.add_row(
            x.measured.stage,
            f"{x.measured.steps:,}",
            "-" if x.measured.step_s is None else _seconds(x.measured.step_s),
            _seconds(x.estimate.time.total),
            _off_by(x.time_deviation),
            _off_by(x.mix_time_deviation),
            f"{x.measured.peak_gib:.1f}",
            f"{x.estimate.memory.peak:.1f}",
            _off_by(x.memory_deviation),
        )
    console.print()
    console.print(table)
    console.print(
        "[dim]Estimates for one document a row, and for documents of the mix, on the GPU named above. Memory is what torch "
        'allocates at most, as a run shows it: compare it with "peak in torch", not with "needed".[/]'
    )
    for x in compared:
        if x.measured.step_s is None:
            console.print(
                f"[dim]stage {x.measured.stage}: the time of a step is not compared: the run has {x.measured.steps} of them, "
                f"and the first {WARM_UP_STEPS} are warm-up[/]",
                soft_wrap=True,
            )


def _off_by(deviation: float | None) -> str:
    return "-" if deviation is None else f"{deviation:+.0%}"


def _hours(hours: float | None) -> str:
    return "-" if hours is None else _si(hours) if hours >= 1000 else f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"


def _si(number: float, units: Sequence[str] = ("Z", "E", "P", "T", "G", "M", "k")) -> str:
    size = 10.0 ** (3 * len(units))
    for unit in units:
        if number >= size:
            value = number / size
            return (
                f"{value:,.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}" if value >= 10 else f"{value:.2f}{unit}"
            )
        size /= 1000
    return f"{number:.3g}"


def _count(number: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"
