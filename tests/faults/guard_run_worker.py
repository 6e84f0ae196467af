"""Runs ``m1 pretrain``'s engine once with bad samples in it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from support.pretraining import pretrained


def spoil(bad: dict[str, Any]) -> None:
    """Multiply the loss of micro-batches that hold a bad sample, from now on in this process.

    Args:
        bad: a factor by sample id, "nan", or "nan once", which is used up by the first. A sample id is a row of any stage, or
            "TOKENS:ROW" a row of the stage whose rows have so many tokens.
    """
    from m1_stages.training import step

    original = step._loss

    def forward_step(batches: Any, model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        factor = 1.0
        tokens = batch.tokens.shape[1] // len(batch.sample_ids)
        for sample in (name for row in batch.sample_ids for name in (str(row), f"{tokens}:{row}")):
            if sample in bad:
                factor = math.nan if str(bad[sample]).startswith("nan") else float(bad[sample])
                if bad[sample] == "nan once":
                    del bad[sample]

        def loss(mask: Any, per_token: Any) -> Any:
            return original(mask, per_token * factor)

        return model(batch), partial(loss, batch.loss_mask)

    step._forward_step = forward_step


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as ``pretrained`` with ``bad`` samples."""
    spoil(job.get("bad", {}))
    return pretrained(job)
