"""Searches the fastest layouts that fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from m1_stages.config import Config, ModelConfig
from m1_stages.errors import EnvironmentProblem
from m1_stages.plan.flops import training_flops
from m1_stages.plan.hardware import CALIBRATION, GIB, Gpu
from m1_stages.plan.layout import Layout, accepts, enumerate_layouts
from m1_stages.plan.memory import Activations, Memory
from m1_stages.plan.memory.host import HostMemory, SaveMode, choose_save_mode, estimate_host_memory
from m1_stages.plan.memory.policy import ActivationChoice, MemoryPolicy, choose_activations, memory_policy_of
from m1_stages.plan.shapes import count_parameters
from m1_stages.plan.stage_workload import StageWorkload, model_with_vocab, stage_workloads
from m1_stages.plan.timing import StepTime, StepTimeModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The GPUs that the plan is for, and the settings that all layouts share."""

    gpu: Gpu
    gpus: int
    memory_policy: MemoryPolicy
    distributed_optimizer: bool

    def holds(self, need: Memory) -> bool:
        """Return whether ``need`` fits a GPU with ``Calibration.headroom`` left free."""
        return need.needed <= (1 - CALIBRATION.headroom) * self.gpu.memory_gib

    def host_memory(self, m: ModelConfig, workload: StageWorkload, layout: Layout, need: Memory) -> HostMemory:
        """Estimate the memory of the fullest host, with GPUs that need ``need``."""
        policy, per_node = self.memory_policy, self.gpu.gpus_per_node
        return estimate_host_memory(m, layout, need, bf16=policy.bf16, per_node=per_node, lora=workload.lora)

    def saves(self, host: HostMemory) -> SaveMode | None:
        """Return how checkpoints are written; None when no host has the memory to copy one."""
        try:
            return choose_save_mode(host, self.gpu.host_memory_gib, self.memory_policy)
        except EnvironmentProblem:
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutEstimate:
    """A layout with its memory, its step time and its speed."""

    layout: Layout
    micro_batch_rows: int
    micro_batches: int
    activations: Activations
    memory: Memory
    host: HostMemory
    saves: SaveMode | None
    """How checkpoints are written; None when a host has too little memory to copy one."""
    time: StepTime
    """Time of a step when every row is one document."""
    mix_time: StepTime
    """Time of a step when documents are as long as the mix says."""
    tokens_per_s_per_gpu: float
    mfu: float
    """Causal-halved FLOPs of forward and backward, nothing counted twice, over the vendor's peak."""
    fits: bool
    """Into the GPUs and their hosts."""


def estimate_layout(m: ModelConfig, workload: StageWorkload, layout: Layout, machine: Machine) -> LayoutEstimate:
    """Estimate memory and time of ``workload`` on ``layout``, whether it fits or not."""
    micro_batch_rows = workload.micro_batch_rows_per_rank(layout.data)
    micro_batches = workload.rows // (layout.data * micro_batch_rows)
    choice = choose_activations(m, workload, layout, machine.memory_policy, machine.gpu.memory_gib)
    row, mix = (
        _time(m, workload, layout, machine, choice.activations, pairs)
        for pairs in (workload.row_pairs, workload.mix_pairs)
    )
    host = machine.host_memory(m, workload, layout, choice.memory)
    saves = machine.saves(host)
    tokens_per_s = workload.tokens_per_step / row.total / layout.gpus
    peak = machine.gpu.bf16_flops if machine.memory_policy.bf16 else machine.gpu.fp32_flops
    return LayoutEstimate(
        layout=layout,
        micro_batch_rows=micro_batch_rows,
        micro_batches=micro_batches,
        activations=choice.activations,
        memory=choice.memory,
        host=host,
        saves=saves,
        time=row,
        mix_time=mix,
        tokens_per_s_per_gpu=tokens_per_s,
        mfu=tokens_per_s * training_flops(m, workload.row_pairs).total / peak,
        fits=machine.holds(choice.memory) and saves is not None,
    )


def step_costs(
    config: Config, stages: Collection[str], layout: Layout, gpu: Gpu | None
) -> tuple[dict[str, float], str]:
    """Estimate what a step of each of ``stages`` costs with documents of the mix; only ratios mean anything.

    Returns:
        By stage, the seconds of a step on ``gpu``, or its FLOPs where the GPU is not known or ``layout`` does not hold all of
        the stages; and which of them it is, in words.
    """
    m, workloads = model_with_vocab(config), [w for w in stage_workloads(config) if w.stage in stages]
    if gpu is None or not all(accepts(m, layout, workload) for workload in workloads):
        flops = {w.stage: training_flops(m, w.mix_pairs).total * w.tokens_per_step for w in workloads}
        return flops, "the FLOPs that m1 plan counts"
    machine = Machine(
        gpu=gpu,
        gpus=layout.gpus,
        memory_policy=memory_policy_of(config),
        distributed_optimizer=layout.distributed_optimizer,
    )
    seconds = {w.stage: estimate_layout(m, w, layout, machine).mix_time.total for w in workloads}
    return seconds, f"the times of a step that m1 plan estimates for {gpu.name}"


def fastest_layouts(
    m: ModelConfig, workload: StageWorkload, machine: Machine, *, most: int = 3
) -> list[LayoutEstimate]:
    """Return the fastest layouts that fit, at most ``most``."""
    timed: list[tuple[float, int, int, Layout]] = []
    for layout, choice in fitting_layouts(m, workload, machine):
        seconds = _time(m, workload, layout, machine, choice.activations, workload.row_pairs).total
        # Of layouts that are equally fast, the one that cuts less.
        cuts = layout.tensor * layout.pipeline * layout.context * layout.expert * layout.expert_tensor
        timed.append((seconds, cuts, len(timed), layout))
    return [estimate_layout(m, workload, layout, machine) for *_, layout in sorted(timed)[:most]]


def layout_memory(m: ModelConfig, workload: StageWorkload, layout: Layout, machine: Machine) -> Memory:
    """Estimate the memory of the fullest GPU."""
    return choose_activations(m, workload, layout, machine.memory_policy, machine.gpu.memory_gib).memory


def _time(
    m: ModelConfig, workload: StageWorkload, layout: Layout, machine: Machine, activations: Activations, pairs: float
) -> StepTime:
    micro_batch_rows = workload.micro_batch_rows_per_rank(layout.data)
    model = StepTimeModel(
        m,
        layout,
        machine.gpu,
        tokens=workload.seq_len * micro_batch_rows,
        pairs=pairs,
        bf16=machine.memory_policy.bf16,
        activations=activations,
        offload_optimizer=machine.memory_policy.offload_optimizer,
    )
    return model.step(workload.rows // (layout.data * micro_batch_rows))


def accepted_layouts(m: ModelConfig, workload: StageWorkload, machine: Machine) -> Iterator[Layout]:
    """Yield the layouts that the trainer accepts, whether they fit or not."""
    # The configured choice comes first; a sharded optimizer is tried in addition, because it saves memory of the GPU.
    for sharded in sorted({machine.distributed_optimizer, True}):
        yield from enumerate_layouts(
            m, workload, gpus=machine.gpus, gpus_per_node=machine.gpu.gpus_per_node, distributed_optimizer=sharded
        )


def fitting_layouts(
    m: ModelConfig, workload: StageWorkload, machine: Machine, *, hosts: bool = True
) -> Iterator[tuple[Layout, ActivationChoice]]:
    """Yield the layouts that fit with their treatment of activations; the optimizer is sharded only where it must be.

    Args:
        hosts: their hosts have to hold the copy of a checkpoint, too.
    """
    if _states_exceed_memory(m, machine):
        return
    unsharded: set[Layout] = set()
    for layout in accepted_layouts(m, workload, machine):
        if replace(layout, distributed_optimizer=False) in unsharded:
            continue  # it fits without a sharded optimizer
        choice = choose_activations(m, workload, layout, machine.memory_policy, machine.gpu.memory_gib)
        saves = not hosts or machine.saves(machine.host_memory(m, workload, layout, choice.memory))
        if saves and machine.holds(choice.memory):
            if not layout.distributed_optimizer:
                unsharded.add(layout)
            yield layout, choice


def _states_exceed_memory(m: ModelConfig, machine: Machine) -> bool:
    """Return whether weights, gradients and optimizer state alone do not fit, however they are sharded."""
    # An offloaded optimizer is on the device for its step.
    return (
        count_parameters(m).total * (18 if machine.memory_policy.bf16 else 16) / machine.gpus
        > machine.gpu.memory_gib * GIB
    )
