"""The whole plan of a configuration: what ``m1 plan`` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import lcm
from typing import Any

from m1_stages.config import ModelConfig, ParallelConfig, Resolved
from m1_stages.plan.change import Change, smallest_change
from m1_stages.plan.flops import PUBLISHED_RATIO, Flops, Generation, generation, training
from m1_stages.plan.hardware import Gpu
from m1_stages.plan.layout import of_config
from m1_stages.plan.memory_policy import habits_of
from m1_stages.plan.run_measurements import Measured, read_measured
from m1_stages.plan.search import Candidate, Machine, accepted, best, evaluate
from m1_stages.plan.shapes import Parameters, count
from m1_stages.plan.stage_workload import Work, model_of, works

RELEASED_TOTAL = 456_089_655_296
"""Parameters of the released model: only for its shape do published FLOP ratios mean anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A measured stage beside the estimate for the same layout."""

    measured: Measured
    estimate: Candidate
    """For the layout that ran, its activations kept or recomputed as they were."""

    @property
    def time_deviation(self) -> float:
        """Estimate over measurement, minus 1; one document a row."""
        return self.estimate.time.total / self.measured.step_s - 1

    @property
    def mix_time_deviation(self) -> float:
        """The same with documents of the mix."""
        return self.estimate.mix_time.total / self.measured.step_s - 1

    @property
    def memory_deviation(self) -> float:
        """Estimate over measurement, minus 1."""
        return self.estimate.memory.peak / self.measured.peak_gib - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage."""

    work: Work
    flops: Flops
    """Of training one token, every row one document."""
    mix_flops: Flops
    """The same with documents as long as the mix says."""
    layouts: list[Candidate]
    """Fastest first; empty when nothing fits."""
    configured: Candidate | None
    """The configuration's own layout; None when the trainer refuses it on these GPUs."""
    compared: Compared | None

    def hours(self, candidate: Candidate, *, mix: bool = False) -> float | None:
        """GPU-hours of the stage."""
        if self.work.steps is None:
            return None
        time = candidate.mix_time if mix else candidate.time
        return self.work.steps * time.total * candidate.layout.gpus / 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything."""

    preset: str
    machine: Machine
    parallel: ParallelConfig
    parameters: Parameters
    generation: list[Generation]
    stages: list[StagePlan]
    left_out: dict[str, str]
    """Why a stage that ran is not compared, by its name."""
    change: Change | None
    """What makes everything fit; None when it does."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready. Memory in GiB, times in seconds, FLOPs per token."""
        return {
            "preset": self.preset,
            "gpu": self.machine.gpu.name,
            "gpus": self.machine.gpus,
            "gpu_memory_gib": self.machine.gpu.memory_gib,
            "precision": "bf16" if self.machine.habits.bf16 else "fp32",
            "recompute": self.machine.habits.recompute,
            "offload_activations": self.machine.habits.offload_activations,
            "offload_optimizer": self.machine.habits.offload_optimizer,
            "fits": self.change is None,
            "change": asdict(self.change) if self.change else None,
            "parameters": self.parameters.as_dict(),
            "generation": [item.as_dict() for item in self.generation],
            "stages": [self._stage(stage) for stage in self.stages],
            "not_compared": self.left_out,
        }

    def _stage(self, stage: StagePlan) -> dict[str, Any]:
        work, compared = stage.work, stage.compared
        return {
            "stage": work.stage,
            "seq_len": work.seq_len,
            "rows_per_step": work.rows,
            "tokens_per_step": work.tokens_per_step,
            "steps": work.steps,
            "flops_per_token": stage.flops.as_dict(),
            "flops_per_token_mix": stage.mix_flops.as_dict(),
            "flops_per_step": stage.flops.times(work.tokens_per_step).as_dict(),
            "layouts": [self._candidate(stage, x) for x in stage.layouts],
            "configured": self._candidate(stage, stage.configured) if stage.configured else None,
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

    def _candidate(self, stage: StagePlan, x: Candidate) -> dict[str, Any]:
        return {
            "parallel": x.layout.settings(),
            "data": x.layout.data,
            "arguments": x.layout.arguments(self.parallel),
            "micro_rows": x.micro_rows,
            "micro_batches": x.micro_batches,
            "fits": x.fits,
            "activations": asdict(x.activations),
            "memory_gib": x.memory.as_dict(),
            "step_s": x.time.as_dict(),
            "step_s_mix": x.mix_time.as_dict(),
            "tokens_per_s_per_gpu": x.tokens_per_s_per_gpu,
            "mfu": x.mfu,
            "gpu_hours": stage.hours(x),
            "gpu_hours_mix": stage.hours(x, mix=True),
        }


def fewest_gpus(parallel: ParallelConfig) -> int:
    """GPUs that the configured layout needs at least, or the configured processes."""
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    return lcm(model_ranks, expert_ranks, parallel.processes or 1)


def _compared(m: ModelConfig, work: Work, ran: Measured, machine: Machine) -> Compared:
    habits = machine.habits
    if ran.activations is not None:
        habits = replace(
            habits,
            recompute="always" if ran.activations.recompute else "never",
            offload_activations=ran.activations.offload,
        )
    return Compared(measured=ran, estimate=evaluate(m, work, ran.layout, replace(machine, habits=habits)))


def make_plan(resolved: Resolved, gpu: Gpu, gpus: int | None = None) -> Plan:
    """Plan ``resolved`` on ``gpus`` GPUs, by default as many as its layout needs."""
    config, m = resolved.config, model_of(resolved.config)
    machine = Machine(
        gpu=gpu,
        gpus=gpus or fewest_gpus(config.parallel),
        habits=habits_of(config),
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    measured, left_out = read_measured(resolved.run_dir, config.parallel)
    parameters = count(m)
    stages = []
    for work in works(config):
        own = of_config(config.parallel, machine.gpus)
        ran = measured.get(work.stage)
        if ran and (ran.seq_len, ran.rows) != (work.seq_len, work.rows):
            left_out[work.stage] = f"it ran with {ran.rows:,} rows of {ran.seq_len:,} tokens a step"
            ran = None
        stages.append(
            StagePlan(
                work=work,
                flops=training(m, work.row_pairs),
                mix_flops=training(m, work.mix_pairs),
                layouts=best(m, work, machine),
                configured=evaluate(m, work, own, machine) if own and accepted(m, work, own) else None,
                compared=_compared(m, work, ran, machine) if ran else None,
            )
        )
    stuck = [stage.work for stage in stages if not stage.layouts]
    return Plan(
        preset=config.preset,
        machine=machine,
        parallel=config.parallel,
        parameters=parameters,
        generation=[generation(m, n, published=parameters.total == RELEASED_TOTAL) for n in PUBLISHED_RATIO],
        stages=stages,
        left_out=left_out,
        change=smallest_change(m, stuck, machine, config.preset) if stuck else None,
    )
