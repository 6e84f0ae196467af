"""Runs ``m1 pretrain``'s job once with bad samples in it."""

from __future__ import annotations

import math
from typing import Any

from support.pretraining import pretrained


def spoil(bad: dict[str, Any]) -> None:
    """Multiply the loss of micro-batches that hold a bad sample, from now on in this process.

    Args:
        bad: a factor by sample id, "nan", or "nan once", which is used up by the first. A sample id is a row of any stage, or
            "TOKENS:ROW" a row of the stage whose rows have so many tokens.
    """
    from m1_stages.training.objective import NextTokenCrossEntropy

    original = NextTokenCrossEntropy.loss

    def loss(self: NextTokenCrossEntropy, batch: Any, output: Any) -> Any:
        factor = 1.0
        tokens = batch.tokens.shape[1] // len(batch.sample_ids)
        for sample in (name for row in batch.sample_ids for name in (str(row), f"{tokens}:{row}")):
            if sample in bad:
                factor = math.nan if str(bad[sample]).startswith("nan") else float(bad[sample])
                if bad[sample] == "nan once":
                    del bad[sample]
        return original(self, batch, output * factor)

    NextTokenCrossEntropy.loss = loss  # type: ignore[method-assign]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as ``pretrained`` with ``bad`` samples."""
    spoil(job.get("bad", {}))
    return pretrained(job)
