"""The chain of stages: order, learning rate, what a stage takes over and what it changes. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.lora import LoraConfig, configured_lora
from m1_stages.config.sft_runs import SFT, is_sft, run_of_stage, stage_of_base, stage_of_run
from m1_stages.decay import Slopes, ramp, stage_slopes
from m1_stages.errors import ConfigError


def stages_of(selection: str) -> list[str]:
    """Stage names of a ``--stage`` value (``all`` or one name), in order.

    Raises:
        ConfigError: an unknown stage.
    """
    if selection == "all":
        return list(STAGE_NAMES)
    if selection not in STAGE_NAMES:
        raise ConfigError(f"there is no stage {selection!r}", fix=f"choose one of {', '.join(STAGE_NAMES)}, all")
    return [selection]


def config_section(stage: str) -> str:
    """Section of the configuration that describes ``stage``, like ``stages.32k`` or ``sft``."""
    return SFT if is_sft(stage) else f"stages.{stage}"


def train_command(stage: str) -> str:
    """The command that trains ``stage``, or ``all`` stages of pretraining."""
    if is_sft(stage):
        return "m1 sft" if stage == SFT else f"m1 sft --name {run_of_stage(stage)}"
    return f"m1 pretrain --stage {stage}"


def previous_stage(stage: str) -> str | None:
    """The stage whose final checkpoint ``stage`` starts from; None for the first."""
    index = STAGE_NAMES.index(stage)
    return STAGE_NAMES[index - 1] if index else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSchedule:
    """Linear warm-up, constant, then decay to ``final``; a pure function of the step, so resuming needs no state."""

    peak: float
    final: float
    num_steps: int
    warmup_share: float = 0.0
    constant_share: float = 0.0
    shape: Literal["exponential", "cosine"] = "exponential"

    def at(self, step: int) -> float:
        """Learning rate of 0-based ``step``; the last step runs at ``final`` unless no step is left for the decay."""
        warmup = round(self.warmup_share * self.num_steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        constant_end = warmup + round(self.constant_share * self.num_steps)
        decay_steps = self.num_steps - 1 - constant_end
        if step <= constant_end or decay_steps <= 0:
            return self.peak
        progress = min(1.0, (step - constant_end) / decay_steps)
        if self.shape == "cosine":
            return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return float(self.peak * (self.final / self.peak) ** progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What the training loop needs to know of one stage; derived from the configuration alone."""

    stage: str
    starts_from: str | None
    """Stage whose final checkpoint is taken over; None: random initial weights."""
    context_tokens: int
    seq_len: int
    rope_base: float
    global_batch_rows: int
    micro_batch_rows: int
    num_steps: int
    lr: LrSchedule
    ramp_length: int
    """Steps over which slopes that differ would move."""
    slopes_old: Slopes
    slopes_new: Slopes
    softmax_layers: tuple[int, ...] = ()
    """0-based; their rows of slopes are unused."""
    config_section: str
    """Section of the configuration that describes the stage, like ``stages.32k`` or ``sft``."""
    title: str
    """What a person reads as the stage's name."""
    lora: LoraConfig | None = None
    """The adapters that are trained in place of all weights."""

    @property
    def ramp_steps(self) -> int:
        """Steps over which the slopes move when nothing holds the ramp; 0 when they do not move."""
        return 0 if self.slopes_old == self.slopes_new else self.ramp_length

    def starting_from(self, slopes: Slopes) -> StagePlan:
        """The same plan with a ramp that starts at ``slopes``: those the stage before really ended with."""
        return replace(self, slopes_old=slopes)

    @property
    def tokens(self) -> int:
        """Tokens trained in the stage."""
        return self.num_steps * self.global_batch_rows * self.seq_len

    def slopes_at(self, progress: float) -> Slopes:
        """Slopes at ramp ``progress`` in [0, 1]."""
        return ramp(self.slopes_old, self.slopes_new, progress)


def plan_stage(resolved: Resolved, stage: str) -> StagePlan:
    """Derive the plan of ``stage``: its slopes start where the previous stage's end."""
    config = resolved.config
    s, before, steps = config.stages[stage], previous_stage(stage), config.num_steps(stage)
    new = stage_slopes(resolved, stage)
    old = stage_slopes(resolved, before) if before else new
    return StagePlan(
        stage=stage,
        starts_from=before,
        context_tokens=s.context_tokens,
        seq_len=config.seq_len(stage),
        rope_base=s.rope_base,
        global_batch_rows=config.global_batch_rows(stage),
        micro_batch_rows=s.micro_batch_rows,
        num_steps=steps,
        lr=LrSchedule(
            peak=s.lr_peak,
            final=s.lr_final,
            num_steps=steps,
            warmup_share=s.lr_warmup_share,
            constant_share=s.lr_constant_share,
        ),
        ramp_length=max(1, round(config.curriculum.decay_ramp_share * steps)),
        slopes_old=old,
        slopes_new=new,
        softmax_layers=softmax_layers(resolved),
        config_section=config_section(stage),
        title=f"stage {stage}",
    )


def plan_sft(resolved: Resolved, num_rows: int, base: tuple[Slopes, float] | None = None) -> StagePlan:
    """Derive the plan of fine-tuning on ``num_rows`` packed rows: decay rates and RoPE base stay those of what it starts from.

    Args:
        base: the decay rates and the RoPE base of an imported model or another fine-tuning; those of a stage of pretraining
            are configured.
    """
    config, x = resolved.config, resolved.config.sft
    seq_len = config.sft_seq_len
    rows = min(num_rows, max(1, x.global_batch_tokens // seq_len))
    steps = max(1, round(num_rows * x.epochs / rows))
    stage = stage_of_run(resolved.sft_run or SFT)
    slopes, rope_base = base or (stage_slopes(resolved, x.base_stage), config.stages[x.base_stage].rope_base)
    return StagePlan(
        stage=stage,
        starts_from=stage_of_base(x.base_stage),
        context_tokens=x.context_tokens,
        seq_len=seq_len,
        rope_base=rope_base,
        global_batch_rows=rows,
        micro_batch_rows=x.micro_batch_rows,
        num_steps=steps,
        lr=LrSchedule(
            peak=x.lr_peak, final=x.lr_final, num_steps=steps, warmup_share=x.lr_warmup_share, shape="cosine"
        ),
        ramp_length=max(1, round(config.curriculum.decay_ramp_share * steps)),
        slopes_old=slopes,
        slopes_new=slopes,
        softmax_layers=softmax_layers(resolved),
        config_section=config_section(SFT),
        title=f"fine-tuning {resolved.sft_run}".rstrip(),
        lora=configured_lora(x, stage),
    )


def softmax_layers(resolved: Resolved) -> tuple[int, ...]:
    """0-based indices of the layers without decay."""
    model = resolved.config.model
    return tuple(layer for layer in range(model.num_layers) if model.is_softmax(layer))


def micro_batch_rows(global_batch_rows: int, configured_rows: int, dp_size: int) -> int:
    """Return the rows of a micro-batch: as configured, or the next smaller number that divides what a data-parallel rank has.

    With more ranks than rows it is 1, and ``m1_data.sampling.loader.batch_rows`` says what is wrong.
    """
    local_rows = global_batch_rows // dp_size
    candidates = (m for m in range(1, min(configured_rows, local_rows) + 1) if local_rows % m == 0)
    return max(candidates, default=1)


def move_ramp(progress: float, ramp_steps: int, direction: Literal["advance", "hold", "reverse"]) -> float:
    """Ramp progress in [0, 1] after one more step; ``reverse`` goes back by two steps' worth."""
    if direction == "hold" or ramp_steps == 0:
        return progress
    steps = 1.0 if direction == "advance" else -2.0
    moved = min(1.0, max(0.0, progress + steps / ramp_steps))
    return 1.0 if moved > 1.0 - 1e-9 else moved  # guards against float rounding
