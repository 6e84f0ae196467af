"""The chain of stages: order, learning rate, what a stage takes over and what it changes. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from m1_data.errors import ConfigError
from m1_stages.config import STAGE_NAMES, Resolved, StageConfig
from m1_stages.decay import Slopes, ramp, stage_slopes


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


def previous_stage(stage: str) -> str | None:
    """The stage whose final checkpoint ``stage`` starts from; None for the first."""
    index = STAGE_NAMES.index(stage)
    return STAGE_NAMES[index - 1] if index else None


def learning_rate(stage: StageConfig, step: int, num_steps: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up, constant, then exponential decay to ``lr_final``.

    The last step runs at ``lr_final`` unless warm-up and constant share leave no step for the decay.
    """
    warmup = round(stage.lr_warmup_share * num_steps)
    if step < warmup:
        return stage.lr_peak * (step + 1) / warmup
    constant_end = warmup + round(stage.lr_constant_share * num_steps)
    decay_steps = num_steps - 1 - constant_end
    if step <= constant_end or decay_steps <= 0:
        return stage.lr_peak
    progress = min(1.0, (step - constant_end) / decay_steps)
    return float(stage.lr_peak * (stage.lr_final / stage.lr_peak) ** progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What the loop needs to know of one stage; derived from the configuration alone."""

    stage: str
    config: StageConfig
    seq_len: int
    global_batch_rows: int
    num_steps: int
    ramp_steps: int
    """Steps over which the slopes move when nothing holds the ramp; 0 when they do not move."""
    slopes_old: Slopes
    slopes_new: Slopes

    def slopes_at(self, progress: float) -> Slopes:
        """Slopes at ramp ``progress`` in [0, 1]."""
        return ramp(self.slopes_old, self.slopes_new, progress)

    def lr(self, step: int) -> float:
        """Learning rate of 0-based ``step``."""
        return learning_rate(self.config, step, self.num_steps)


def plan_stage(resolved: Resolved, stage: str) -> StagePlan:
    """Derive the plan of ``stage``: old slopes are what the previous stage ends with."""
    config = resolved.config
    before = previous_stage(stage)
    new = stage_slopes(resolved, stage)
    old = stage_slopes(resolved, before) if before else new
    steps = config.num_steps(stage)
    return StagePlan(
        stage=stage,
        config=config.stages[stage],
        seq_len=config.seq_len(stage),
        global_batch_rows=config.global_batch_rows(stage),
        num_steps=steps,
        ramp_steps=0 if old == new else max(1, round(config.curriculum.decay_ramp_share * steps)),
        slopes_old=old,
        slopes_new=new,
    )


def advance_ramp(progress: float, ramp_steps: int, *, hold: bool = False) -> float:
    """Ramp progress after one more step; ``hold`` keeps it (the hook of the gradient guard)."""
    if hold or ramp_steps == 0:
        return progress
    return min(1.0, progress + 1.0 / ramp_steps)
