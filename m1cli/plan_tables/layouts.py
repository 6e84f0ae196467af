"""Tables of the parallel layouts: speed, memory and time of a step, and what a run measured of them."""

from __future__ import annotations

from rich.markup import escape

from m1_stages.plan.estimate import Compared, Plan
from m1_stages.plan.run_measurements import WARM_UP_STEPS
from m1_stages.plan.search import LayoutEstimate
from m1cli.console import console
from m1cli.plan_tables.numbers import add_parts, hours_text, seconds_text, table_of


def show_layouts(plan: Plan) -> None:
    """Show the fastest layouts that fit, and how to choose them."""
    table = table_of(
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
        f"{x.memory.needed:,.0f}" if x.fits else f"[red]{x.memory.needed:,.0f}[/]", seconds_text(x.time.total),
        f"{x.tokens_per_s_per_gpu:,.0f}", f"{x.mfu:.0%}",
    ]  # fmt: skip


def show_memory(plan: Plan) -> None:
    """Show what fills a GPU."""
    stages = [stage for stage in plan.stages if stage.layouts]
    table = table_of("Memory of the fullest GPU in layout #1, GiB", "", [s.workload.stage for s in stages])
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
    add_parts(table, stages, names, lambda x: x.memory, 2)
    table.add_section()
    table.add_row("peak in torch", *(f"{s.layouts[0].memory.peak:,.1f}" for s in stages))
    table.add_row("[dim]driver, NCCL, fragments[/]", *(f"{s.layouts[0].memory.reserve:,.1f}" for s in stages))
    table.add_row("needed", *(f"[bold]{s.layouts[0].memory.needed:,.1f}[/]" for s in stages))
    console.print(table)
    console.print("[dim]Layer, head and optimizer step are not busy together: the peak has the largest of them.[/]\n")


def show_time(plan: Plan) -> None:
    """Show what a step spends its time on."""
    stages = [stage for stage in plan.stages if stage.layouts]
    title = "Time of a step in layout #1, seconds, every row one document"
    table = table_of(title, "", [s.workload.stage for s in stages])
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
    add_parts(table, stages, names, lambda x: x.time, digits)
    table.add_section()
    table.add_row("step", *(f"[bold]{seconds_text(s.layouts[0].time.total)}[/]" for s in stages))
    table.add_row("step, documents of the mix", *(seconds_text(s.layouts[0].mix_time.total) for s in stages))
    table.add_row("[dim]steps[/]", *(f"{s.workload.steps:,}" if s.workload.steps else "-" for s in stages))
    table.add_row("GPU-hours", *(hours_text(s.hours(s.layouts[0])) for s in stages))
    table.add_row("GPU-hours, mix", *(hours_text(s.hours(s.layouts[0], mix=True)) for s in stages))
    console.print(table)
    console.print("[dim]Nothing overlaps: communication is waited for, as in the trainer.[/]")


def show_measured(compared: list[Compared]) -> None:
    """Show estimates beside what this run measured."""
    table = table_of(
        "Measured in this run",
        "stage",
        ["steps", "s/step", "estimate", "off by", "with mix", "peak GiB", "estimate", "off by"],
    )
    for x in compared:
        table.add_row(
            x.measured.stage,
            f"{x.measured.steps:,}",
            "-" if x.measured.step_s is None else seconds_text(x.measured.step_s),
            seconds_text(x.estimate.time.total),
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
