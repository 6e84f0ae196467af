"""Estimates the host memory that a run needs, and decides with it how saves are written.

A save copies what its rank writes to host memory, whether training goes on meanwhile or waits. On a GPU that memory is kept for
the next save (``m1_stages.checkpoint.host_copy``), so there is one copy, and saves that training waits for would need as much.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from m1_stages.config import STAGE_NAMES, Config, ModelConfig
from m1_stages.config.lora import LoraConfig
from m1_stages.errors import EnvironmentProblem
from m1_stages.plan.hardware import CALIBRATION, GIB, Calibration
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory.gpu import Memory
from m1_stages.plan.memory.policy import MemoryPolicy, choose_activations, memory_policy_of
from m1_stages.plan.shapes import RankParameters, expert_parameters, held_parameters, trained_parameters
from m1_stages.plan.stage_workload import model_with_vocab, stage_workloads

CLEARLY = 0.8
"""A run is refused only if less than this part of what it needs is there: the need is an estimate, and memory may be freed."""


def checkpoint_bytes(layout: Layout, *, bf16: bool) -> tuple[int, int]:
    """Return the bytes of a parameter in a checkpoint: of its weight, and of its optimizer state.

    The state is both moments, and a master weight where there is one: with bf16 or a distributed optimizer.
    """
    return (2 if bf16 else 4), (12 if bf16 or layout.distributed_optimizer else 8)


def host_snapshot_bytes(
    m: ModelConfig, layout: Layout, *, bf16: bool, per_node: int, lora: LoraConfig | None = None
) -> tuple[float, float]:
    """Return the bytes that a save copies to host memory: of the process, and of the node, that copy most.

    The ranks of a pipeline stage share its parameters: of what several hold each writes a part. Tensors stay whole, so one of the
    ranks copies the largest.

    Args:
        per_node: ranks of a machine.
        lora: the adapters, where they alone are trained: a checkpoint holds all weights, and optimizer state for these.
    """
    sizes = checkpoint_bytes(layout, bf16=bf16)
    ranks, per_node = layout.gpus // layout.pipeline, min(per_node, layout.gpus)
    counts = held_parameters, trained_parameters
    of_stage = [
        sum(
            size * _of_all_ranks(count(m, layout, stage, lora), layout)
            for size, count in zip(sizes, counts, strict=True)
        )
        for stage in range(layout.pipeline)
    ]
    on_node = max(1, per_node // ranks)
    node = max(sum(of_stage[first : first + on_node]) for first in range(0, layout.pipeline, on_node))
    process = max(max(of_stage) / ranks, 4 * _largest_tensor(m, layout))
    return process, max(node * min(1.0, per_node / ranks), process)


def _of_all_ranks(rank: RankParameters, layout: Layout) -> int:
    """Parameters of a pipeline stage, of which each rank holds ``rank``."""
    return rank.dense * layout.tensor + rank.experts * layout.expert * layout.expert_tensor


def _largest_tensor(m: ModelConfig, layout: Layout) -> float:
    """Parameters of the largest tensor of a rank: gate and up of a layer's experts, or a table of the vocabulary."""
    experts = 2 / 3 * m.num_experts * expert_parameters(m) / (layout.expert * layout.expert_tensor)
    return max(experts, m.padded_vocab_size * m.hidden_size / layout.tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Host memory of the node that needs most, in GiB."""

    snapshot: float
    """Copies of what its processes write to a checkpoint."""
    largest_snapshot: float
    """The copy of the process that writes most; no part of the sum."""
    loaded: float
    """What Megatron's distributed optimizer reads in every process that loads a checkpoint: fp32 weights and both moments."""
    optimizer: float
    """Offloaded optimizer state, pinned."""
    activations: float
    """Offloaded inputs of layers, pinned."""
    training: float
    """The processes; without a GPU weights, gradients and optimizer state."""

    @property
    def needed(self) -> float:
        """GiB that the node must have."""
        return self.training + self.activations + self.optimizer + self.snapshot + self.loaded

    def as_dict(self) -> dict[str, float]:
        """Return the parts and the sum ``needed``."""
        return {**asdict(self), "needed": self.needed}


def estimate_host_memory(
    m: ModelConfig,
    layout: Layout,
    memory: Memory,
    *,
    bf16: bool,
    per_node: int,
    device: Literal["cpu", "cuda"] = "cuda",
    lora: LoraConfig | None = None,
    c: Calibration = CALIBRATION,
) -> HostMemory:
    """Estimate the host memory of the fullest of the nodes that train ``m``.

    Args:
        memory: of the fullest GPU.
        per_node: ranks of a machine.
        device: on "cpu" the state that is trained is in host memory, too, and nothing is offloaded.
        lora: the adapters, where they alone are trained.
    """
    process, node = host_snapshot_bytes(m, layout, bf16=bf16, per_node=per_node, lora=lora)
    processes = min(per_node, layout.gpus)
    on_gpu = device == "cuda"
    trained_parts = [trained_parameters(m, layout, stage, lora) for stage in range(layout.pipeline)]
    loaded = 12 * max(x.dense + x.experts for x in trained_parts) if layout.distributed_optimizer else 0
    trained = c.process_gib if on_gpu else memory.weights + memory.gradients + memory.optimizer
    return HostMemory(
        snapshot=node / GIB,
        largest_snapshot=process / GIB,
        loaded=processes * loaded / GIB,
        # torch rounds pinned blocks up to powers of two.
        optimizer=c.pinned_rounding * processes * memory.host_optimizer,
        activations=c.pinned_rounding * processes * memory.host_activations * on_gpu,
        training=processes * trained,
    )


def run_host_memory(
    config: Config, layout: Layout, *, per_node: int, device: Literal["cpu", "cuda"], lora: LoraConfig | None = None
) -> HostMemory:
    """Estimate the host memory of a run of ``config``: of the stage that needs most, or of fine-tuning with ``lora``.

    Args:
        per_node: ranks of a machine.
        device: where it trains.
    """
    m, policy = model_with_vocab(config), memory_policy_of(config)
    # Without memory on the device, all that may be offloaded is.
    workloads = stage_workloads(config)
    if lora is not None:
        workloads = [replace(workload, lora=lora) for workload in workloads if workload.stage not in STAGE_NAMES]
    needs = [choose_activations(m, workload, layout, policy, 0.0).memory for workload in workloads]
    largest = max(needs, key=lambda memory: memory.host)
    return estimate_host_memory(m, layout, largest, bf16=policy.bf16, per_node=per_node, device=device, lora=lora)


def available_host_gib() -> float:
    """Return the memory of this machine that programs can have now."""
    import psutil

    return float(psutil.virtual_memory().available) / GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveMode:
    """How checkpoints are written, and why."""

    background: bool
    copy_gib: float
    """Of the process that copies most."""
    why: str
    warning: str = ""
    """What a person should know, when it is close."""

    def __str__(self) -> str:
        where = "beside training" if self.background else "while training waits"
        warning = f"; {self.warning}" if self.warning else ""
        return f"{where}: {self.why}{warning}"


def choose_save_mode(
    need: HostMemory, available_gib: float, policy: MemoryPolicy, *, device: Literal["cpu", "cuda"] = "cuda"
) -> SaveMode:
    """Decide how checkpoints are written: as ``run.async_save`` says, if their copy fits.

    Args:
        available_gib: memory of a node that ``need`` may take.

    Raises:
        EnvironmentProblem: the copy of a checkpoint clearly does not fit.
    """
    copy = f"a copy of {_size(need.largest_snapshot)} in a process, {_size(need.snapshot)} on a node"
    have = f"{_size(need.needed)} of host memory on a node, which has {_size(available_gib)}"
    if CLEARLY * need.needed <= available_gib:
        warning = "" if need.needed <= available_gib else f"with {copy} the run needs about {have}"
        return SaveMode(
            background=policy.saves_in_background(device), copy_gib=need.largest_snapshot, why=copy, warning=warning
        )
    offers = ["--set run.offload_activations=false"] * (need.activations > 0)
    offers += ["--set optim.offload=false"] * (need.optimizer > 0)
    offers += ["--set parallel.distributed_optimizer=false, which reads no more than it keeps"] * (need.loaded > 0)
    raise EnvironmentProblem(
        f"a checkpoint could not be saved and loaded again: with {copy} the run needs {have}",
        where="host memory",
        fix=", or ".join([*offers, "start fewer processes on a node, or take one with more memory"]),
    )


def _size(gib: float) -> str:
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{gib * 1024:,.0f} MiB"
