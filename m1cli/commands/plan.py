"""Implements ``m1 plan``: parameters, FLOPs, memory and time of every stage, and the parallel layouts to choose."""

from __future__ import annotations

import difflib
import json
import tempfile
from pathlib import Path

from m1_stages.config import PRESETS, Resolved
from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError, EnvironmentProblem
from m1_stages.plan.estimate import Plan, make_plan
from m1_stages.plan.hardware import gpu_named
from m1cli.console import console
from m1cli.plan_tables.layouts import show_layouts, show_measured, show_memory, show_time
from m1cli.plan_tables.model import show_flops, show_generation, show_parameters
from m1cli.plan_tables.numbers import count
from m1cli.plan_tables.run import show_host_memory, show_wall_time


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
        f"{', '.join(settings)}: [bold]{count(parameters.total)}[/] parameters, "
        f"[bold]{count(parameters.active)}[/] active\n"
    )
    show_parameters(plan)
    show_flops(plan)
    if any(item.published for item in plan.generation):
        show_generation(plan)
    if any(stage.layouts for stage in plan.stages):
        show_layouts(plan)
        show_memory(plan)
        show_host_memory(plan)
        show_time(plan)
        show_wall_time(plan)
    compared = [stage.compared for stage in plan.stages if stage.compared]
    if compared:
        show_measured(compared)
    for name, why in plan.not_compared.items():
        console.print(f"[dim]stage {name} of this run is not compared: {why}[/]", soft_wrap=True)
