"""Runs ``m1 pretrain``'s job once and asks it to stop at one place."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from support.pretraining import pretrained

from m1_data.sampling.loader import PackedDataset
from m1_stages.evaluation import stage_evaluation
from m1_stages.training.checkpointer import Checkpointer
from m1_stages.training.objective import NextTokenCrossEntropy

PLACES: dict[str, tuple[Any, str, int]] = {
    "data": (PackedDataset, "batch", 2),
    "forward": (NextTokenCrossEntropy, "forward", 1),
    "micro-batch": (NextTokenCrossEntropy, "loss", 3),
    "save": (Checkpointer, "_start", 1),
    "evaluate": (stage_evaluation, "needle_map", 1),
}
"""Where: owner, function, and its call that is interrupted."""


def interrupt(owner: Any, name: str, at: int) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(owner, name, call)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as ``pretrained``; the process sends itself a SIGTERM at ``place``, one of ``PLACES`` or none, once."""
    if job["place"] != "none":
        interrupt(*PLACES[job["place"]])
    return pretrained(job)
