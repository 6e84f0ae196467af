"""Decides whether a stage keeps its activations or recomputes them: one rule for ``m1 plan`` and the trainer.

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
from m1_stages.plan.memory.gpu import Activations, Memory, estimate_memory
from m1_stages.plan.stage_workload import StageWorkload

KEPT = Activations()


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPolicy:
    """What the configuration says about precision, recomputation, host memory and saves."""

    bf16: bool
    recompute: Literal["auto", "always", "never"]
    offload_activations: bool = False
    """Applies in stages that recompute."""
    offload_optimizer: bool = False
    async_save: Literal["auto", "on", "off"] = "auto"

    @property
    def recomputed(self) -> Activations:
        """The treatment of activations in a stage that recomputes."""
        return Activations(recompute=True, offload=self.offload_activations)

    def saves_in_background(self, device: Literal["cpu", "cuda"]) -> bool:
        """Return whether checkpoints are written beside training on ``device``."""
        return device == "cuda" if self.async_save == "auto" else self.async_save == "on"


def memory_policy_of(config: Config) -> MemoryPolicy:
    """Return the memory policy of a configuration."""
    return MemoryPolicy(
        bf16=config.run.precision == "bf16",
        recompute=config.run.recompute,
        offload_activations=config.run.offload_activations,
        offload_optimizer=config.optim.offload,
        async_save=config.run.async_save,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationChoice:
    """The choice for a stage's activations, the memory it needs, and the reason."""

    activations: Activations
    memory: Memory
    why: str


def choose_activations(
    m: ModelConfig, workload: StageWorkload, layout: Layout, policy: MemoryPolicy, memory_gib: float
) -> ActivationChoice:
    """Choose for GPUs of ``memory_gib`` GiB.

    A layout that recomputes may still not fit: compare ``memory.needed`` of the result with the GPU's memory.
    """

    def need(activations: Activations) -> Memory:
        micro_batch_rows = max(1, workload.micro_batch_rows_per_rank(layout.data))
        return estimate_memory(
            m,
            layout,
            tokens=workload.seq_len * micro_batch_rows,
            micro_batches=max(1, workload.rows // (layout.data * micro_batch_rows)),
            bf16=policy.bf16,
            activations=activations,
            offload_optimizer=policy.offload_optimizer,
            lora=workload.lora,
        )

    if policy.recompute == "always":
        return ActivationChoice(
            activations=policy.recomputed, memory=need(policy.recomputed), why="run.recompute = always"
        )
    kept = need(KEPT)
    if policy.recompute == "never":
        return ActivationChoice(activations=KEPT, memory=kept, why="run.recompute = never")
    part = 1 - (CALIBRATION.keep_margin_experts if layout.expert > 1 else CALIBRATION.keep_margin)
    share = f"{part:.0%} of {memory_gib:.1f} GiB"
    if kept.needed <= part * memory_gib:
        return ActivationChoice(
            activations=KEPT, memory=kept, why=f"about {kept.needed:.1f} GiB are needed, within {share}"
        )
    return ActivationChoice(
        activations=policy.recomputed,
        memory=need(policy.recomputed),
        why=f"kept, about {kept.needed:.1f} GiB would be needed, more than {share}",
    )
