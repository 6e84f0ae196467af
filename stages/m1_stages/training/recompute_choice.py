"""Chooses at the start of a stage whether its activations are kept or recomputed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m1_stages.config import Config
from m1_stages.curriculum import StagePlan
from m1_stages.plan.hardware import GIB
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory import Activations
from m1_stages.plan.memory_policy import choose, habits_of
from m1_stages.plan.stage_workload import Work
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
    habits = habits_of(config)
    if device.name != "cuda" and habits.recompute == "auto":
        return RecomputeDecision(activations=Activations(), why="recomputation is off on CPU")
    work = Work(
        stage=plan.stage,
        seq_len=plan.seq_len,
        rows=plan.global_batch_rows,
        micro_rows=plan.micro_batch_rows,
        steps=plan.num_steps,
        mix_pairs=plan.seq_len / 2,
    )
    layout = Layout(
        tensor=topology.tp_size,
        pipeline=topology.pp_size,
        virtual_pipeline=config.parallel.virtual_pipeline,
        pipeline_layers=config.parallel.pipeline_layers,
        context=topology.cp_size,
        expert=topology.ep_size,
        expert_tensor=topology.etp_size,
        data=topology.dp_size,
        distributed_optimizer=config.parallel.distributed_optimizer,
        dispatcher=config.parallel.dispatcher,
    )
    chosen = choose(config.model, work, layout, habits, agree_min(_free_gib(device)))
    return RecomputeDecision(activations=chosen.activations, why=chosen.why)


def _free_gib(device: Device) -> float:
    """Memory of its GPU that this process can have, GiB: others may hold a part."""
    if device.name != "cuda":
        return 0.0
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) / GIB
