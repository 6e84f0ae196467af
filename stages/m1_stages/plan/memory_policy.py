"""Whether a stage keeps its activations or computes them again: one rule for ``m1 plan`` and the trainer.

Keeping is faster wherever it fits. It is chosen only when the estimate leaves ``Calibration.keep_margin`` of the device free (a
tenth; a quarter with expert parallelism): running out of memory after days costs more than the tenth of a step that recomputing
takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from m1_stages.config import Config, ModelConfig
from m1_stages.plan.hardware import CALIBRATION
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory import Activations, Memory, memory
from m1_stages.plan.stage_workload import Work

KEPT = Activations()


@dataclass(frozen=True, kw_only=True, slots=True)
class Habits:
    """What the configuration says about memory."""

    bf16: bool
    recompute: Literal["auto", "always", "never"]
    offload_activations: bool = False
    """In stages that recompute."""
    offload_optimizer: bool = False

    @property
    def recomputed(self) -> Activations:
        """How a stage recomputes."""
        return Activations(recompute=True, offload=self.offload_activations)


def habits_of(config: Config) -> Habits:
    """Of a configuration."""
    return Habits(
        bf16=config.run.precision == "bf16",
        recompute=config.run.recompute,
        offload_activations=config.run.offload_activations,
        offload_optimizer=config.optim.offload,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a stage does with its activations, and why."""

    activations: Activations
    memory: Memory
    why: str


def choose(m: ModelConfig, work: Work, layout: Layout, habits: Habits, memory_gib: float) -> Choice:
    """For GPUs of ``memory_gib`` GiB. What is computed again may still not fit: see ``memory.needed``."""

    def need(activations: Activations) -> Memory:
        micro_rows = max(1, work.micro_rows_of(layout.data))
        return memory(
            m,
            layout,
            tokens=work.seq_len * micro_rows,
            micro_batches=max(1, work.rows // (layout.data * micro_rows)),
            bf16=habits.bf16,
            activations=activations,
            offload_optimizer=habits.offload_optimizer,
        )

    if habits.recompute == "always":
        return Choice(activations=habits.recomputed, memory=need(habits.recomputed), why="run.recompute = always")
    kept = need(KEPT)
    if habits.recompute == "never":
        return Choice(activations=KEPT, memory=kept, why="run.recompute = never")
    part = 1 - (CALIBRATION.keep_margin_experts if layout.expert > 1 else CALIBRATION.keep_margin)
    share = f"{part:.0%} of {memory_gib:.1f} GiB"
    if kept.needed <= part * memory_gib:
        return Choice(activations=KEPT, memory=kept, why=f"about {kept.needed:.1f} GiB are needed, within {share}")
    return Choice(
        activations=habits.recomputed,
        memory=need(habits.recomputed),
        why=f"kept, about {kept.needed:.1f} GiB would be needed, more than {share}",
    )
