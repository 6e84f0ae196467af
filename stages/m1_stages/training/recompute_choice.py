"""Chooses at the start of a stage whether its activations are kept or recomputed; says what to change when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from m1_stages.config import Config
from m1_stages.curriculum import StagePlan, micro_batch_rows
from m1_stages.errors import EnvironmentProblem
from m1_stages.plan.hardware import GIB
from m1_stages.plan.layout import layout_from_sizes
from m1_stages.plan.memory import Activations
from m1_stages.plan.memory.policy import choose_activations, memory_policy_of
from m1_stages.plan.stage_workload import StageWorkload
from m1_stages.runtime.collectives import agree_min
from m1_stages.runtime.device import Device
from m1_stages.runtime.parallel import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeDecision:
    """A decision about a stage's activations, the same on all ranks."""

    activations: Activations
    why: str

    def __str__(self) -> str:
        what = "recomputed" if self.activations.recompute else "kept"
        where = ", inputs in host memory" if self.activations.offload else ""
        return f"{what}{where}: {self.why}"


def choose_recompute(config: Config, plan: StagePlan, topology: Topology, device: Device) -> RecomputeDecision:
    """Choose for ``plan``; every rank calls it. On a CPU nothing is recomputed unless the configuration says so."""
    policy = memory_policy_of(config)
    if device.name != "cuda" and policy.recompute == "auto":
        return RecomputeDecision(activations=Activations(), why="recomputation is off on CPU")
    workload = StageWorkload(
        stage=plan.stage,
        config_section=plan.config_section,
        seq_len=plan.seq_len,
        rows=plan.global_batch_rows,
        micro_batch_rows=plan.micro_batch_rows,
        steps=plan.num_steps,
        mix_pairs=plan.seq_len / 2,
        lora=plan.lora,
    )
    layout = layout_from_sizes(config.parallel, topology.sizes())
    chosen = choose_activations(config.model, workload, layout, policy, agree_min(_free_gib(device)))
    return RecomputeDecision(activations=chosen.activations, why=chosen.why)


def _free_gib(device: Device) -> float:
    """Memory of its GPU that this process can have, GiB: others may hold a part."""
    if device.name != "cuda":
        return 0.0
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) / GIB


@contextmanager
def out_of_memory_explained(
    config: Config, plan: StagePlan, topology: Topology, decision: RecomputeDecision
) -> Iterator[None]:
    """Turn running out of memory while ``plan`` is trained into an error that names the stage, the choice and the next key.

    Raises:
        EnvironmentProblem: the device or the host has no memory left.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(
            f"{plan.title} ran out of memory with rows of {plan.seq_len:,} tokens: {str(error).splitlines()[0][:200]}",
            where=f"[{plan.config_section}]; activations {decision}",
            fix=_next_key(config, plan, topology.dp_size, decision.activations),
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is torch's or Python's report of too little memory; on a CPU torch raises a bare RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _next_key(config: Config, plan: StagePlan, dp_size: int, chosen: Activations) -> str:
    """Return the first change that needs less memory and was not made yet, cheapest in time first."""
    rows = micro_batch_rows(plan.global_batch_rows, plan.micro_batch_rows, dp_size)
    if rows > 1:
        change = f"--set {plan.config_section}.micro_batch_rows={rows // 2}"
    elif not chosen.recompute:
        change = "--set run.recompute=always"
    elif not chosen.offload and config.run.device != "cpu" and torch.cuda.is_available():
        change = "--set run.offload_activations=true"
    elif not config.optim.offload and config.run.device != "cpu" and torch.cuda.is_available():
        change = "--set optim.offload=true"
    else:
        ranks = 2 * config.parallel.context
        return f"divide the rows among more processes: --set parallel.context={ranks}; m1 plan shows what fits"
    return f"run the same command again with {change}"
