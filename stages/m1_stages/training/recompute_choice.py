"""Chooses at the start of a stage whether its activations are kept or recomputed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m1_stages.config import Config
from m1_stages.curriculum import StagePlan
from m1_stages.plan.hardware import GIB
from m1_stages.plan.layout import layout_from_sizes
from m1_stages.plan.memory import Activations
from m1_stages.plan.memory_policy import choose_activations, memory_policy_of
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
