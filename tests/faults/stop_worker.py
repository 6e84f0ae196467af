"""Runs ``m1 pretrain``'s engine once and asks it to stop at one place."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from support.pretraining import pretrained

from m1_data.sampling.loader import PackedDataset
from m1_stages.jobs import evaluate
from m1_stages.training import checkpointer as saving
from m1_stages.training import step

PLACES: dict[str, tuple[Any, str, int]] = {
    "data": (PackedDataset, "batch", 2),
    "forward": (step, "_forward_step", 1),
    "micro-batch": (step, "_loss", 3),
    "save": (saving.Saver, "_begin", 1),
    "evaluate": (evaluate, "needle_map", 1),
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
