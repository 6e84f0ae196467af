"""Makes the whole plan of a configuration: what ``m1 plan`` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from m1_stages.config import ModelConfig, ParallelConfig, Resolved
from m1_stages.plan.change import Change, smallest_change
from m1_stages.plan.flops import PUBLISHED_RATIO, Flops, Generation, generation_flops, training_flops
from m1_stages.plan.goodput import WallTime, predict_wall_time
from m1_stages.plan.hardware import Gpu
from m1_stages.plan.layout import accepts, configured_layout, fewest_gpus
from m1_stages.plan.memory.policy import memory_policy_of
from m1_stages.plan.run_measurements import Measured, read_measured
from m1_stages.plan.search import LayoutEstimate, Machine, estimate_layout, fastest_layouts
from m1_stages.plan.shapes import Parameters, count_parameters
from m1_stages.plan.stage_workload import StageWorkload, model_with_vocab, stage_workloads
from m1_stages.plan.timing import StepTime

RELEASED_TOTAL = 456_089_655_296
"""Parameters of the released model: only for its shape do published FLOP ratios mean anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A measured stage, and the estimate for the same layout."""

    measured: Measured
    estimate: LayoutEstimate
    """For the layout that ran, its activations kept or recomputed as they were."""

    @property
    def time_deviation(self) -> float | None:
        """Estimated over measured time of a step, minus 1, when every row is one document; None when no time was measured."""
        return self._time_deviation(self.estimate.time)

    @property
    def mix_time_deviation(self) -> float | None:
        """Estimated over measured time of a step, minus 1, with documents of the mix; None when no time was measured."""
        return self._time_deviation(self.estimate.mix_time)

    @property
    def memory_deviation(self) -> float:
        """Estimated over measured peak memory, minus 1; both are what torch allocates, without ``Memory.reserve``."""
        return self.estimate.memory.peak / self.measured.peak_gib - 1

    def _time_deviation(self, estimate: StepTime) -> float | None:
        return None if self.measured.step_s is None else estimate.total / self.measured.step_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEstimate:
    """The estimate for one stage."""

    workload: StageWorkload
    flops: Flops
    """FLOPs of training one token when every row is one document."""
    mix_flops: Flops
    """FLOPs of training one token when documents are as long as the mix says."""
    layouts: list[LayoutEstimate]
    """Fastest first; empty when nothing fits."""
    configured: LayoutEstimate | None
    """The configuration's own layout; None when the trainer refuses it on these GPUs."""
    compared: Compared | None
    wall_time: WallTime | None = None
    """Of the fastest layout; None without one, or when the number of steps is not known yet."""

    def hours(self, candidate: LayoutEstimate, *, mix: bool = False) -> float | None:
        """Return the GPU-hours of the stage; None when its number of steps is not known yet."""
        if self.workload.steps is None:
            return None
        time = candidate.mix_time if mix else candidate.time
        return self.workload.steps * time.total * candidate.layout.gpus / 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan of all stages of a configuration on one machine."""

    preset: str
    machine: Machine
    parallel: ParallelConfig
    parameters: Parameters
    generation: list[Generation]
    stages: list[StageEstimate]
    not_compared: dict[str, str]
    """By stage name, the reason why a stage that ran is not compared with its estimate."""
    change: Change | None
    """The smallest change that makes all stages fit; None when they do."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON: memory in GiB, times in seconds, FLOPs per token."""
        return {
            "preset": self.preset,
            "gpu": self.machine.gpu.name,
            "gpus": self.machine.gpus,
            "gpu_memory_gib": self.machine.gpu.memory_gib,
            "node_memory_gib": self.machine.gpu.host_memory_gib,
            "precision": "bf16" if self.machine.memory_policy.bf16 else "fp32",
            "recompute": self.machine.memory_policy.recompute,
            "offload_activations": self.machine.memory_policy.offload_activations,
            "offload_optimizer": self.machine.memory_policy.offload_optimizer,
            "fits": self.change is None,
            "change": asdict(self.change) if self.change else None,
            "parameters": self.parameters.as_dict(),
            "generation": [item.as_dict() for item in self.generation],
            "stages": [self._stage(stage) for stage in self.stages],
            "not_compared": self.not_compared,
        }

    def _stage(self, stage: StageEstimate) -> dict[str, Any]:
        workload, compared = stage.workload, stage.compared
        return {
            "stage": workload.stage,
            "seq_len": workload.seq_len,
            "rows_per_step": workload.rows,
            "tokens_per_step": workload.tokens_per_step,
            "steps": workload.steps,
            "flops_per_token": stage.flops.as_dict(),
            "flops_per_token_mix": stage.mix_flops.as_dict(),
            "flops_per_step": stage.flops.scaled(workload.tokens_per_step).as_dict(),
            "layouts": [self._layout(stage, x) for x in stage.layouts],
            "wall_time": None if stage.wall_time is None else stage.wall_time.as_dict(),
            "configured": self._layout(stage, stage.configured) if stage.configured else None,
            "measured": None
            if compared is None
            else {
                "steps": compared.measured.steps,
                "step_s": compared.measured.step_s,
                "peak_gib": compared.measured.peak_gib,
                "estimated_step_s": compared.estimate.time.total,
                "estimated_step_s_mix": compared.estimate.mix_time.total,
                "estimated_peak_gib": compared.estimate.memory.peak,
                "time_deviation": compared.time_deviation,
                "time_deviation_mix": compared.mix_time_deviation,
                "memory_deviation": compared.memory_deviation,
            },
        }

    def _layout(self, stage: StageEstimate, x: LayoutEstimate) -> dict[str, Any]:
        return {
            "parallel": x.layout.settings(),
            "data": x.layout.data,
            "arguments": x.layout.arguments(self.parallel),
            "micro_rows": x.micro_batch_rows,
            "micro_batches": x.micro_batches,
            "fits": x.fits,
            "activations": asdict(x.activations),
            "memory_gib": x.memory.as_dict(),
            "host_memory_gib": x.host.as_dict(),
            "saves": None if x.saves is None else asdict(x.saves),
            "step_s": x.time.as_dict(),
            "step_s_mix": x.mix_time.as_dict(),
            "tokens_per_s_per_gpu": x.tokens_per_s_per_gpu,
            "mfu": x.mfu,
            "gpu_hours": stage.hours(x),
            "gpu_hours_mix": stage.hours(x, mix=True),
        }


def _compared(m: ModelConfig, workload: StageWorkload, ran: Measured, machine: Machine) -> Compared:
    policy = replace(
        machine.memory_policy,
        recompute="always" if ran.activations.recompute else "never",
        offload_activations=ran.activations.offload,
    )
    return Compared(
        measured=ran, estimate=estimate_layout(m, workload, ran.layout, replace(machine, memory_policy=policy))
    )


def make_plan(resolved: Resolved, gpu: Gpu, gpus: int | None = None) -> Plan:
    """Plan ``resolved`` on ``gpus`` GPUs, by default as many as its layout needs."""
    config, m = resolved.config, model_with_vocab(resolved.config)
    machine = Machine(
        gpu=gpu,
        gpus=gpus or fewest_gpus(config.parallel),
        memory_policy=memory_policy_of(config),
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    measured, not_compared = read_measured(resolved.run_dir, config.parallel)
    parameters = count_parameters(m)
    stages = []
    for workload in stage_workloads(config):
        own = configured_layout(config.parallel, machine.gpus)
        ran = measured.get(workload.stage)
        if ran and (ran.seq_len, ran.rows) != (workload.seq_len, workload.rows):
            not_compared[workload.stage] = f"it ran with {ran.rows:,} rows of {ran.seq_len:,} tokens a step"
            ran = None
        fastest = fastest_layouts(m, workload, machine)
        every = config.run.save_every_steps
        stages.append(
            StageEstimate(
                workload=workload,
                flops=training_flops(m, workload.row_pairs),
                mix_flops=training_flops(m, workload.mix_pairs),
                layouts=fastest,
                configured=estimate_layout(m, workload, own, machine) if own and accepts(m, own, workload) else None,
                compared=_compared(m, workload, ran, machine) if ran else None,
                wall_time=predict_wall_time(m, workload, machine, fastest[0], save_every_steps=every)
                if fastest
                else None,
            )
        )
    stuck = [stage.workload for stage in stages if not stage.layouts]
    return Plan(
        preset=config.preset,
        machine=machine,
        parallel=config.parallel,
        parameters=parameters,
        generation=[generation_flops(m, n, published=parameters.total == RELEASED_TOTAL) for n in PUBLISHED_RATIO],
        stages=stages,
        not_compared=not_compared,
        change=smallest_change(m, stuck, machine, config.preset) if stuck else None,
    )
