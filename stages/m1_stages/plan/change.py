"""Explains why no layout fits, and finds the smallest change that makes one fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m1_stages.config import ModelConfig
from m1_stages.plan.hardware import GPUS
from m1_stages.plan.search import Machine, accepted_layouts, fitting_layouts, layout_memory
from m1_stages.plan.stage_workload import StageWorkload


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The reason why no layout fits, and a change that makes one fit."""

    stages: list[str]
    """Stages for which no layout fits."""
    what: str
    fix: str


_MOST_GPUS = 16_384


def smallest_change(m: ModelConfig, workloads: list[StageWorkload], machine: Machine, name: str) -> Change:
    """Explain why ``workloads`` do not fit, and find the smallest change with which all of them fit."""
    smallest = [(_smallest_need(m, workload, machine), workload.stage) for workload in workloads]
    stages = [workload.stage for workload in workloads]
    on = f"{machine.gpus} {machine.gpu.name}"
    refused = [stage for needed, stage in smallest if needed is None]
    if refused:
        what = (
            f"the trainer accepts no layout of {name} on {on} for stage {refused[0]}: its sizes do not divide by that"
        )
        return Change(stages=stages, what=what, fix=_other_gpu_counts(m, workloads, machine))
    if all(next(fitting_layouts(m, workload, machine, hosts=False), None) for workload in workloads):
        needed, stage = max((_smallest_host_need(m, workload, machine), workload.stage) for workload in workloads)
        what = (
            f"{name} fits on {on}, but its checkpoints do not into their hosts: the leanest layout of stage {stage} needs "
            f"{needed:,.0f} GiB of host memory on a node to save one, which has {machine.gpu.host_memory_gib:,.0f}"
        )
        return Change(stages=stages, what=what, fix=_fitting_change(m, workloads, machine))
    needed, stage = max(((x, stage) for x, stage in smallest if x is not None), key=lambda pair: pair[0])
    what = (
        f"{name} does not fit on {on}: the leanest layout of stage {stage} needs {needed:,.0f} GiB of each GPU, "
        f"which has {machine.gpu.memory_gib:.0f}"
    )
    return Change(stages=stages, what=what, fix=_fitting_change(m, workloads, machine))


def _other_gpu_counts(m: ModelConfig, workloads: list[StageWorkload], machine: Machine) -> str:
    """Name the nearest numbers of GPUs on which every stage has a layout."""

    def accepted_on(gpus: int) -> bool:
        on = replace(machine, gpus=gpus)
        return all(next(accepted_layouts(m, workload, on), None) is not None for workload in workloads)

    below = next((n for n in range(machine.gpus - 1, 0, -1) if accepted_on(n)), None)
    above = next((n for n in range(machine.gpus + 1, 2 * machine.gpus + 1) if accepted_on(n)), None)
    near = " or ".join(f"{n}" for n in (below, above) if n)
    return f"take {near} {machine.gpu.name}, or change global_batch_tokens so that its rows divide by {machine.gpus}"


def _smallest_need(m: ModelConfig, workload: StageWorkload, machine: Machine) -> float | None:
    """GiB that the leanest accepted layout needs of each GPU; None when the trainer accepts no layout."""
    return min(
        (layout_memory(m, workload, x, machine).needed for x in accepted_layouts(m, workload, machine)), default=None
    )


def _smallest_host_need(m: ModelConfig, workload: StageWorkload, machine: Machine) -> float:
    """GiB of host memory that the leanest layout needs on a node, of those that fit the GPUs."""
    return min(
        machine.host_memory(m, workload, layout, choice.memory).needed
        for layout, choice in fitting_layouts(m, workload, machine, hosts=False)
    )


def _fitting_change(m: ModelConfig, workloads: list[StageWorkload], machine: Machine) -> str:
    def fits(tried: list[StageWorkload], on: Machine) -> bool:
        return all(next(fitting_layouts(m, workload, on), None) is not None for workload in tried)

    single = [replace(workload, micro_batch_rows=1) for workload in workloads]
    rows = " ".join(
        f"--set {workload.config_section}.micro_batch_rows=1" for workload in workloads if workload.micro_batch_rows > 1
    )
    policy = machine.memory_policy
    recomputing = replace(
        machine, memory_policy=replace(policy, recompute="auto" if policy.recompute == "never" else policy.recompute)
    )
    offloading = replace(recomputing, memory_policy=replace(recomputing.memory_policy, offload_activations=True))
    offloading_all = replace(offloading, memory_policy=replace(offloading.memory_policy, offload_optimizer=True))
    recompute = "--set run.recompute=auto" if policy.recompute == "never" else ""
    offload = "" if policy.offload_activations else "--set run.offload_activations=true"
    optimizer = "" if policy.offload_optimizer else "--set optim.offload=true"
    if recompute and fits(workloads, recomputing):
        return f"recompute activations: {recompute}"
    if rows and fits(single, machine):
        return f"take one row at a time: {rows}"
    if rows and recompute and fits(single, recomputing):
        return f"recompute activations and take one row at a time: {recompute} {rows}"
    for setting, extra in ((offloading, ""), (offloading_all, optimizer)):
        if fits(single, setting):
            return f"keep more in host memory: {' '.join(x for x in (recompute, rows, offload, extra) if x)}"
    settings = " ".join(part for part in (recompute, rows) if part)
    suffix = f", with {settings}" if settings else ""
    offers = []
    gpus = 2 * machine.gpus
    while gpus <= _MOST_GPUS and not fits(single, replace(recomputing, gpus=gpus)):
        gpus *= 2
    if gpus <= _MOST_GPUS:
        offers.append(f"take {gpus} {machine.gpu.name} instead of {machine.gpus}")
    larger = sorted((gpu.memory_gib, gpu.name) for gpu in GPUS.values() if gpu.memory_gib > machine.gpu.memory_gib)
    for _, other in larger:
        if fits(single, replace(recomputing, gpu=GPUS[other])):
            offers.append(f"take {machine.gpus} {other} of {GPUS[other].memory_gib:.0f} GiB")
            break
    shorter = single
    while all(workload.seq_len >= 2048 for workload in shorter) and not fits(shorter, recomputing):
        shorter = [replace(workload, seq_len=workload.seq_len // 2, rows=workload.rows * 2) for workload in shorter]
    if shorter is not single and fits(shorter, recomputing):
        factor = workloads[0].seq_len // shorter[0].seq_len
        offers.append(f"divide the context by {factor} (curriculum.length_scale)")
    if not offers:
        return f"not even {_MOST_GPUS:,} {machine.gpu.name} hold it: choose a smaller model"
    return ", or ".join(offers) + suffix
