"""Cuts a step's rows into micro-batches and says which rank trains on which."""

from __future__ import annotations

from collections.abc import Sequence

from m1_data.sampling.loader import batch_rows
from m1_stages import curriculum
from m1_stages.config import Resolved
from m1_stages.curriculum import StagePlan
from m1_stages.errors import ConfigError
from m1_stages.runtime.parallel import Topology


def micro_batch_rows(plan: StagePlan, dp_size: int) -> int:
    """Return the rows of a micro-batch: as configured, or the next smaller number that divides a data-parallel rank's rows."""
    return curriculum.micro_batch_rows(plan.global_batch_rows, plan.micro_batch_rows, dp_size)


def row_ids(plan: StagePlan, topology: Topology, step: int, dp_rank: int | None = None) -> list[list[int]]:
    """Return the row ids of each micro-batch of a data-parallel rank: a pure function of the step.

    Args:
        step: step of the stage.
        dp_rank: the data-parallel rank; this process's own by default.
    """
    return batch_rows(
        step,
        global_batch=plan.global_batch_rows,
        dp_rank=topology.dp_rank if dp_rank is None else dp_rank,
        dp_size=topology.dp_size,
        micro_batch=micro_batch_rows(plan, topology.dp_size),
    )


def refuse_uneven_pipeline(resolved: Resolved, plans: Sequence[StagePlan], dp_size: int) -> None:
    """Refuse stages whose micro-batches an interleaved pipeline cannot take in groups of its size, before the first is trained.

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
            section = plan.config_section
            raise ConfigError(
                f"an interleaved pipeline of {p.pipeline} takes micro-batches in groups of {p.pipeline}; stage {plan.stage} "
                f"has {count} on each of {dp_size} data-parallel ranks ({plan.global_batch_rows} rows a step, {rows} at a time)",
                where=f"{resolved.origins.get('parallel.virtual_pipeline', '')}, key parallel.virtual_pipeline",
                fix=f"raise {section}.global_batch_tokens or lower {section}.micro_batch_rows until the number is a "
                f"multiple of {p.pipeline}, or set parallel.virtual_pipeline = 1",
            )
