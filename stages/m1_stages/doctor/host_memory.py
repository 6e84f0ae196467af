"""Checks that the memory of this machine holds the copy of a checkpoint."""

from __future__ import annotations

from typing import Literal

from m1_stages.config import Resolved
from m1_stages.doctor.probes import Finding
from m1_stages.errors import EnvironmentProblem
from m1_stages.plan.layout import configured_layout, fewest_gpus
from m1_stages.plan.memory.host import available_host_gib, choose_save_mode, run_host_memory
from m1_stages.plan.memory.policy import memory_policy_of


def host_memory_finding(resolved: Resolved, gpus: int) -> Finding:
    """Compare what a run needs on this machine, with a process on each of ``gpus``, with what is available."""
    config = resolved.config
    fewest = fewest_gpus(config.parallel)
    here = gpus or config.parallel.processes or 1
    layout = configured_layout(config.parallel, max(here, fewest)) or configured_layout(config.parallel, fewest)
    assert layout is not None, "the fewest processes are what the layout divides"
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    need = run_host_memory(config, layout, per_node=here, device=device)
    try:
        available_gib = available_host_gib()
    except ImportError:  # which has a finding of its own
        return Finding(name="host memory", ok=True, detail="not known without psutil")
    try:
        saves = choose_save_mode(need, available_gib, memory_policy_of(config), device=device)
    except EnvironmentProblem as error:
        return Finding(name="host memory", ok=False, detail=error.what, fix=error.fix)
    if saves.warning:
        fix = "end other programs, start fewer processes on this machine, or take one with more memory"
        return Finding(name="host memory", ok=False, detail=saves.warning, fix=fix)
    detail = f"{available_gib:,.1f} GiB available, a run needs {need.needed:,.1f}; checkpoints are written {saves}"
    return Finding(name="host memory", ok=True, detail=detail)
