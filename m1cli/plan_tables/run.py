"""Tables of a run beside its steps: host memory, saves, and where the wall time of a stage goes."""

from __future__ import annotations

from m1_stages.plan.estimate import Plan
from m1cli.console import console
from m1cli.plan_tables.numbers import add_parts, hours_text, seconds_text, table_of


def show_host_memory(plan: Plan) -> None:
    """Show what fills the memory of a host, and how checkpoints are written with it."""
    stages = [stage for stage in plan.stages if stage.layouts]
    gpu = plan.machine.gpu
    node = min(gpu.gpus_per_node, plan.machine.gpus)
    title = f"Host memory of a node of {node} {gpu.name} in layout #1, GiB of {gpu.host_memory_gib:,.0f}"
    table = table_of(title, "", [s.workload.stage for s in stages])
    names = {
        "copy of a checkpoint": "snapshot",
        "gathered for a save": "gathered",
        "offloaded optimizer": "optimizer",
        "offloaded activations": "activations",
        "processes": "training",
    }
    add_parts(table, stages, names, lambda x: x.host, 1)
    table.add_section()
    hosts = [(s.layouts[0].host, s.layouts[0].saves) for s in stages]
    table.add_row("needed", *(f"[bold]{host.needed:,.1f}[/]" for host, _ in hosts))
    table.add_row("[dim]copy, fullest process[/]", *(f"{host.largest_snapshot:,.1f}" for host, _ in hosts))
    console.print(table)
    console.print(
        "[dim]A save copies the state to host memory, whether training waits for it or not; a process keeps that memory for its "
        "next save. Replicas share the writing. A distributed optimizer is gathered by every process when a save begins.[/]"
    )
    said: dict[str, list[str]] = {str(saves): [] for _, saves in hosts if saves}
    for stage, (_, saves) in zip(stages, hosts, strict=True):
        if saves:
            said[str(saves)].append(stage.workload.stage)
        if saves and saves.warning:
            console.print(f"[bold yellow]stage {stage.workload.stage}: {saves.warning}[/]", soft_wrap=True)
    for how, names_of in said.items():
        console.print(f"checkpoints of {', '.join(names_of)} are written {how}")
    console.print()


def show_wall_time(plan: Plan) -> None:
    """Show the share of the steps in the wall time of each stage, and what the rest is."""
    known = [(stage, time) for stage in plan.stages if stage.layouts and (time := stage.wall_time)]
    if not known:
        return
    title = "Wall time of a stage in layout #1, documents of the mix"
    table = table_of(title, "", [stage.workload.stage for stage, _ in known])
    times = [time for _, time in known]
    for name, part in {
        "steps (goodput)": "steps_s",
        "saves": "saves_s",
        "evaluation": "evaluation_s",
        "one start, loading": "start_s",
    }.items():
        table.add_row(f"[dim]{name}[/]", *(f"{getattr(time, part) / time.total_s:.2%}" for time in times))
    table.add_section()
    table.add_row("hours", *(hours_text(time.total_s / 3600) for time in times))
    table.add_row("[dim]checkpoints[/]", *(f"{time.saves:,}" for time in times))
    table.add_row("[dim]a save: training waits, s[/]", *(seconds_text(time.save_stall_s) for time in times))
    table.add_row("[dim]a save: until committed, s[/]", *(seconds_text(time.save_commit_s) for time in times))
    table.add_row("[dim]a further start, s[/]", *(seconds_text(time.start_s) for time in times))
    console.print(table)
    console.print(
        "[dim]An undisturbed run, one start a stage, a file system as fast as memory. A further start also repeats the steps "
        "since the last save. The rates are assumptions: m1_stages.plan.hardware, Calibration.[/]"
    )
