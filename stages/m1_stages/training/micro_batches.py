"""How a step's rows become micro-batches; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from m1_stages import curriculum
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan
from m1_stages.errors import ConfigError


def micro_batch_rows(plan: StagePlan, dp_size: int) -> int:
    """Return the rows of a micro-batch of ``plan`` on ``dp_size`` data-parallel ranks (``curriculum.micro_batch_rows``)."""
    return curriculum.micro_batch_rows(plan.global_batch_rows, plan.micro_batch_rows, dp_size)


def refuse_uneven_pipeline(resolved: Resolved, plans: Sequence[StagePlan], dp_size: int) -> None:
    """An interleaved pipeline takes micro-batches in groups of its size; look at every stage before the first is trained.

    Raises:
        ConfigError: the micro-batches of a step do not divide into such groups.
    """
    p = resolved.config.parallel
    if p.virtual_pipeline == 1:
        return
    for plan in plans:
        rows = micro_batch_rows(plan, dp_size)
        count = plan.global_batch_rows // dp_size // rows
        if count == 0 or count % p.pipeline:
            section = "sft" if plan.stage == "sft" else f"stages.{plan.stage}"
            raise ConfigError(
                f"an interleaved pipeline of {p.pipeline} takes micro-batches in groups of {p.pipeline}; stage {plan.stage} "
                f"has {count} on each of {dp_size} data-parallel ranks ({plan.global_batch_rows} rows a step, {rows} at a time)",
                where=f"{resolved.origins.get('parallel.virtual_pipeline', '')}, key parallel.virtual_pipeline",
                fix=f"raise {section}.global_batch_tokens or lower {section}.micro_batch_rows until the number is a "
                f"multiple of {p.pipeline}, or set parallel.virtual_pipeline = 1",
            )
