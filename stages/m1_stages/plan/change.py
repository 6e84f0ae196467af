"""When no layout fits: why, and the smallest change that makes one fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m1_stages.config import ModelConfig
from m1_stages.plan.hardware import GPUS
from m1_stages.plan.search import Machine, fitting, layouts_of, memory_of
from m1_stages.plan.stage_workload import Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Why nothing fits, and what would."""

    stages: list[str]
    """Those that nothing fits for."""
    what: str
    fix: str


_MOST_GPUS = 16_384


def smallest_change(m: ModelConfig, works: list[Work], machine: Machine, name: str) -> Change:
    """One sentence on why ``works`` do not fit, one on the smallest change that makes all of them fit."""
    least = [(_least(m, work, machine), work.stage) for work in works]
    stages = [work.stage for work in works]
    on = f"{machine.gpus} {machine.gpu.name}"
    refused = [stage for needed, stage in least if needed is None]
    if refused:
        what = (
            f"the trainer accepts no layout of {name} on {on} for stage {refused[0]}: its sizes do not divide by that"
        )
        return Change(stages=stages, what=what, fix=_dividing(m, works, machine))
    needed, stage = max(((x, stage) for x, stage in least if x is not None), key=lambda pair: pair[0])
    what = (
        f"{name} does not fit on {on}: the leanest layout of stage {stage} needs {needed:,.0f} GiB of each GPU, "
        f"which has {machine.gpu.memory_gib:.0f}"
    )
    return Change(stages=stages, what=what, fix=_fix(m, works, machine))


def _dividing(m: ModelConfig, works: list[Work], machine: Machine) -> str:
    """The nearest numbers of GPUs that some layout of every stage divides."""

    def accepted_on(gpus: int) -> bool:
        on = replace(machine, gpus=gpus)
        return all(next(layouts_of(m, work, on), None) is not None for work in works)

    below = next((n for n in range(machine.gpus - 1, 0, -1) if accepted_on(n)), None)
    above = next((n for n in range(machine.gpus + 1, 2 * machine.gpus + 1) if accepted_on(n)), None)
    near = " or ".join(f"{n}" for n in (below, above) if n)
    return f"take {near} {machine.gpu.name}, or change global_batch_tokens so that its rows divide by {machine.gpus}"


def _least(m: ModelConfig, work: Work, machine: Machine) -> float | None:
    return min((memory_of(m, work, x, machine).needed for x in layouts_of(m, work, machine)), default=None)


def _fix(m: ModelConfig, works: list[Work], machine: Machine) -> str:
    def fits(tried: list[Work], on: Machine) -> bool:
        return all(next(fitting(m, work, on), None) is not None for work in tried)

    single = [replace(work, micro_rows=1) for work in works]
    rows = " ".join(
        f"--set {'sft' if work.stage == 'sft' else f'stages.{work.stage}'}.micro_batch_rows=1"
        for work in works
        if work.micro_rows > 1
    )
    habits = machine.habits
    again = replace(
        machine, habits=replace(habits, recompute="auto" if habits.recompute == "never" else habits.recompute)
    )
    away = replace(again, habits=replace(again.habits, offload_activations=True))
    both = replace(away, habits=replace(away.habits, offload_optimizer=True))
    recompute = "--set run.recompute=auto" if habits.recompute == "never" else ""
    offload = "" if habits.offload_activations else "--set run.offload_activations=true"
    optimizer = "" if habits.offload_optimizer else "--set optim.offload=true"
    if recompute and fits(works, again):
        return f"recompute activations: {recompute}"
    if rows and fits(single, machine):
        return f"take one row at a time: {rows}"
    if rows and recompute and fits(single, again):
        return f"recompute activations and take one row at a time: {recompute} {rows}"
    for place, extra in ((away, ""), (both, optimizer)):
        if fits(single, place):
            return f"keep more in host memory: {' '.join(x for x in (recompute, rows, offload, extra) if x)}"
    settings = " ".join(part for part in (recompute, rows) if part)
    also = f", with {settings}" if settings else ""
    offers = []
    gpus = 2 * machine.gpus
    while gpus <= _MOST_GPUS and not fits(single, replace(again, gpus=gpus)):
        gpus *= 2
    if gpus <= _MOST_GPUS:
        offers.append(f"take {gpus} {machine.gpu.name} instead of {machine.gpus}")
    larger = sorted((gpu.memory_gib, gpu.name) for gpu in GPUS.values() if gpu.memory_gib > machine.gpu.memory_gib)
    for _, other in larger:
        if fits(single, replace(again, gpu=GPUS[other])):
            offers.append(f"take {machine.gpus} {other} of {GPUS[other].memory_gib:.0f} GiB")
            break
    shorter = single
    while all(work.seq_len >= 2048 for work in shorter) and not fits(shorter, again):
        shorter = [replace(work, seq_len=work.seq_len // 2, rows=work.rows * 2) for work in shorter]
    if shorter is not single and fits(shorter, again):
        factor = works[0].seq_len // shorter[0].seq_len
        offers.append(f"divide the context by {factor} (curriculum.length_scale)")
    if not offers:
        return f"not even {_MOST_GPUS:,} {machine.gpu.name} hold it: choose a smaller model"
    return ", or ".join(offers) + also
