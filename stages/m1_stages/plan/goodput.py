"""Predicts where the wall time of a stage goes: the share of its steps is what is called goodput.

It is that of an undisturbed run on a file system as fast as memory. What is assumed is in ``hardware.Calibration``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from m1_stages.config import ModelConfig
from m1_stages.plan.hardware import CALIBRATION, Calibration
from m1_stages.plan.memory.host import checkpoint_bytes, host_snapshot_bytes
from m1_stages.plan.memory.policy import KEPT
from m1_stages.plan.search import LayoutEstimate, Machine
from m1_stages.plan.shapes import rank_parameters
from m1_stages.plan.stage_workload import StageWorkload
from m1_stages.plan.timing import StepTimeModel

_MOST_ROWS = 64
"""Most rows of an evaluation in one pass (``m1_stages.evaluation.long_context``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WallTime:
    """Seconds of a stage, with documents of the mix: each of ``steps_s`` to ``start_s`` is a part of the whole."""

    steps_s: float
    saves_s: float
    """Training stands still: for copies, and for writing where that is not done beside it, or slower than the next save comes."""
    evaluation_s: float
    start_s: float
    """One start of the command that loads a checkpoint; each further start costs as much, and the steps since the last save."""
    save_stall_s: float
    """Training stands still for one checkpoint."""
    save_commit_s: float
    """From the beginning of a save until it is committed."""
    saves: int

    @property
    def total_s(self) -> float:
        """Seconds of the stage."""
        return self.steps_s + self.saves_s + self.evaluation_s + self.start_s

    @property
    def goodput(self) -> float:
        """Share of the steps."""
        return self.steps_s / self.total_s

    def as_dict(self) -> dict[str, Any]:
        """Return the parts, ``total_s`` and ``goodput``."""
        return {**asdict(self), "total_s": self.total_s, "goodput": self.goodput}


def predict_wall_time(
    m: ModelConfig,
    workload: StageWorkload,
    machine: Machine,
    x: LayoutEstimate,
    *,
    save_every_steps: int,
    c: Calibration = CALIBRATION,
) -> WallTime | None:
    """Predict the wall time of a stage in layout ``x``; None when its number of steps is not known, or it cannot be saved."""
    if workload.steps is None or x.saves is None:
        return None
    layout, bf16 = x.layout, machine.memory_policy.bf16
    copied, _ = host_snapshot_bytes(m, layout, bf16=bf16, per_node=machine.gpu.gpus_per_node, lora=workload.lora)
    held = [rank_parameters(m, layout, stage) for stage in range(layout.pipeline)]
    parameters = max(part.dense + part.experts for part in held)
    gathered = 12 * parameters if layout.distributed_optimizer else 0
    begin_s = c.save_plan_s + gathered / c.gather_bytes_per_s + copied / c.host_copy_bytes_per_s
    write_s = copied / c.write_bytes_per_s
    step_s = x.mix_time.total
    between = (workload.steps - 1) // save_every_steps
    waits_s = max(0.0, write_s - save_every_steps * step_s) if x.saves.background else write_s
    last_s = 0.0 if x.saves.background else write_s
    loaded = sum(checkpoint_bytes(layout, bf16=bf16)) * parameters
    return WallTime(
        steps_s=workload.steps * step_s,
        saves_s=between * (begin_s + waits_s) + begin_s + last_s,
        evaluation_s=sum(_evaluation(m, workload, machine, x, *rows) for rows in workload.evaluated),
        start_s=c.start_s + loaded / c.load_bytes_per_s,
        save_stall_s=begin_s + waits_s,
        save_commit_s=begin_s + write_s,
        saves=between + 1,
    )


def _evaluation(
    m: ModelConfig, workload: StageWorkload, machine: Machine, x: LayoutEstimate, rows: int, length: int
) -> float:
    """Time the forward passes over ``rows`` rows, each of one document: a third of forward and backward."""
    layout = x.layout
    at_once = workload.seq_len * workload.micro_batch_rows // length
    each = max(1, min(at_once, _MOST_ROWS, -(-rows // layout.data)))
    calls = -(-rows // (each * layout.data * layout.pipeline))
    model = StepTimeModel(
        m,
        layout,
        machine.gpu,
        tokens=each * length,
        pairs=length / 2,
        bf16=machine.memory_policy.bf16,
        activations=KEPT,
    )
    time = model.step(layout.pipeline)
    return calls * (time.total - time.data - time.optimizer) / 3
