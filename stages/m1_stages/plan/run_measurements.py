"""Reads what a run measured from its ``metrics.jsonl``, to compare it with the estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from m1_stages.config import ParallelConfig
from m1_stages.events import read_events
from m1_stages.plan.layout import Layout, layout_from_sizes
from m1_stages.plan.memory import Activations
from m1_stages.run_dir import METRICS

_AXES = ("tp", "pp", "cp", "ep", "etp", "dp")
WARM_UP_STEPS = 3
"""Excluded from the time of a step: kernels are compiled in them. The peak of memory counts from the first step on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measurements of one stage of a run on GPUs."""

    stage: str
    steps: int
    seq_len: int
    rows: int
    layout: Layout
    """Distributed optimizer, uneven layers and dispatcher are not in the events: they are assumed as configured."""
    activations: Activations
    step_s: float | None
    """Median seconds of a step; None when all steps are warm-up."""
    peak_gib: float
    """Peak in torch since the stage began, all steps counted."""


def read_measured(run_dir: Path, parallel: ParallelConfig) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return by stage the last measurements on GPUs, and why other stages that ran are excluded; both empty without a run.

    Damaged lines are skipped.
    """
    start: dict[str, Any] = {}
    stage: dict[str, Any] = {}
    found: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {}
    for record in read_events(run_dir / METRICS, skip_damaged=True):
        kind = record["event"]
        if kind == "RunStarted":
            start = record
        elif kind == "StageStarted":
            stage = record
            found[stage["stage"]] = (start, stage, [])
        elif kind == "StepDone" and record["stage"] in found:
            found[record["stage"]][2].append(record)
    excluded = {}
    for name, (start, _, steps) in found.items():
        if not start:
            excluded[name] = f"{METRICS} does not say where it ran"
        elif start["device"] != "cuda":
            excluded[name] = f"it ran on a {start['device']}, and estimates are for GPUs"
        elif not steps:
            excluded[name] = "it has finished no step"
        elif any(start["topology"].get(axis, 0) < 1 for axis in _AXES):
            excluded[name] = f"{METRICS} does not say in which layout it ran"
        elif not all(0 < step[key] < math.inf for step in steps for key in ("step_s", "peak_gib")):
            excluded[name] = f"{METRICS} has a step without time or memory"
    measured = {
        name: _summary(start, begun, steps, parallel)
        for name, (start, begun, steps) in found.items()
        if name not in excluded
    }
    return measured, excluded


def _summary(
    start: dict[str, Any], begun: dict[str, Any], steps: list[dict[str, Any]], parallel: ParallelConfig
) -> Measured:
    return Measured(
        stage=begun["stage"],
        steps=len(steps),
        seq_len=begun["seq_len"],
        rows=begun["global_batch_rows"],
        layout=layout_from_sizes(parallel, start["topology"]),
        activations=Activations(recompute=begun["recompute"], offload=begun["offload_activations"]),
        step_s=median(step["step_s"] for step in steps[WARM_UP_STEPS:]) if len(steps) > WARM_UP_STEPS else None,
        peak_gib=max(step["peak_gib"] for step in steps),
    )
