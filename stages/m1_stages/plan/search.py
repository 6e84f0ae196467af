"""The fastest layouts that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from m1_stages.config import ModelConfig
from m1_stages.plan.flops import training
from m1_stages.plan.hardware import CALIBRATION, GIB, Gpu
from m1_stages.plan.layout import Layout, accepts, candidates
from m1_stages.plan.memory import Activations, Memory
from m1_stages.plan.memory_policy import Habits, choose
from m1_stages.plan.shapes import count
from m1_stages.plan.stage_workload import Work
from m1_stages.plan.timing import StepModel, StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the plan is for."""

    gpu: Gpu
    gpus: int
    habits: Habits
    distributed_optimizer: bool

    def holds(self, need: Memory) -> bool:
        """Whether ``need`` fits a GPU with some room to spare."""
        return need.needed <= (1 - CALIBRATION.headroom) * self.gpu.memory_gib


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with what it takes."""

    layout: Layout
    micro_rows: int
    micro_batches: int
    activations: Activations
    memory: Memory
    time: StepTime
    """When every row is one document."""
    mix_time: StepTime
    """When documents are as long as the mix says."""
    tokens_per_s_per_gpu: float
    mfu: float
    """Causal-halved FLOPs of forward and backward, nothing counted twice, over the vendor's peak."""
    fits: bool


def evaluate(m: ModelConfig, work: Work, layout: Layout, machine: Machine) -> Candidate:
    """What ``work`` takes on ``layout``; fitting or not."""
    micro_rows = work.micro_rows_of(layout.data)
    micro_batches = work.rows // (layout.data * micro_rows)
    chosen = choose(m, work, layout, machine.habits, machine.gpu.memory_gib)
    row, mix = (
        _time(m, work, layout, machine, chosen.activations, pairs) for pairs in (work.row_pairs, work.mix_pairs)
    )
    tokens_per_s = work.tokens_per_step / row.total / layout.gpus
    peak = machine.gpu.bf16_flops if machine.habits.bf16 else machine.gpu.fp32_flops
    return Candidate(
        layout=layout,
        micro_rows=micro_rows,
        micro_batches=micro_batches,
        activations=chosen.activations,
        memory=chosen.memory,
        time=row,
        mix_time=mix,
        tokens_per_s_per_gpu=tokens_per_s,
        mfu=tokens_per_s * training(m, work.row_pairs).total / peak,
        fits=machine.holds(chosen.memory),
    )


def best(m: ModelConfig, work: Work, machine: Machine, *, most: int = 3) -> list[Candidate]:
    """The fastest layouts that fit, at most ``most``."""
    timed: list[tuple[float, int, int, Layout]] = []
    for layout, activations in fitting(m, work, machine):
        seconds = _time(m, work, layout, machine, activations, work.row_pairs).total
        # Of layouts that are equally fast, the one that cuts less.
        cuts = layout.tensor * layout.pipeline * layout.context * layout.expert * layout.expert_tensor
        timed.append((seconds, cuts, len(timed), layout))
    return [evaluate(m, work, layout, machine) for *_, layout in sorted(timed)[:most]]


def memory_of(m: ModelConfig, work: Work, layout: Layout, machine: Machine) -> Memory:
    """Of the fullest GPU."""
    return choose(m, work, layout, machine.habits, machine.gpu.memory_gib).memory


def _time(
    m: ModelConfig, work: Work, layout: Layout, machine: Machine, activations: Activations, pairs: float
) -> StepTime:
    micro_rows = work.micro_rows_of(layout.data)
    model = StepModel(
        m,
        layout,
        machine.gpu,
        tokens=work.seq_len * micro_rows,
        pairs=pairs,
        bf16=machine.habits.bf16,
        activations=activations,
        offload_optimizer=machine.habits.offload_optimizer,
    )
    return model.of(work.rows // (layout.data * micro_rows))


def layouts_of(m: ModelConfig, work: Work, machine: Machine) -> Iterator[Layout]:
    """Layouts that the trainer accepts, whether they fit or not."""
    # The configured choice first; a sharded optimizer is tried besides, because it only saves memory.
    for sharded in sorted({machine.distributed_optimizer, True}):
        yield from candidates(m, work, gpus=machine.gpus, per_node=machine.gpu.per_node, distributed_optimizer=sharded)


def fitting(m: ModelConfig, work: Work, machine: Machine) -> Iterator[tuple[Layout, Activations]]:
    """Layouts that fit, and how; with a sharded optimizer besides only where it must be."""
    if _hopeless(m, machine):
        return
    unsharded: set[Layout] = set()
    for layout in layouts_of(m, work, machine):
        if replace(layout, distributed_optimizer=False) in unsharded:
            continue  # fits without
        chosen = choose(m, work, layout, machine.habits, machine.gpu.memory_gib)
        if machine.holds(chosen.memory):
            if not layout.distributed_optimizer:
                unsharded.add(layout)
            yield layout, chosen.activations


def _hopeless(m: ModelConfig, machine: Machine) -> bool:
    """Weights, gradients and optimizer state alone are too much, however they are spread."""
    # An offloaded optimizer is back for its step.
    return count(m).total * (18 if machine.habits.bf16 else 16) / machine.gpus > machine.gpu.memory_gib * GIB


def accepted(m: ModelConfig, work: Work, layout: Layout | None) -> bool:
    """Whether the trainer runs the configured layout."""
    return layout is not None and accepts(m, layout, work)
