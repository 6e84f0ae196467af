"""Whole runs whose optimizer is watched: the learning rates that it really uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from support.pretraining import pretrained

from m1_stages.config.load import load_config
from m1_stages.events import Event
from m1_stages.jobs import sft
from m1_stages.training import loop
from m1_stages.training.step import train_step


def watched_pretraining(job: dict[str, Any]) -> dict[str, Any]:
    """Train as ``pretrained``; ``rates`` are the learning rates of all parameter groups in each step."""
    return _watched(lambda: pretrained(job))


def watched_fine_tuning(job: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune; returns ``rates`` likewise, and ``lr``, what each step reported."""
    reported: list[float] = []

    def sink(event: Event) -> None:
        if type(event).__name__ == "StepDone":
            reported.append(event.lr)  # type: ignore[union-attr]

    def run() -> dict[str, Any]:
        sft.run(load_config(Path(job["config"]), job["set"]), [sink])
        return {"lr": reported}

    return _watched(run)


def _watched(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    rates: list[list[float]] = []

    def recorded(chunks: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = train_step(chunks, optimizer, *args, **kwargs)
        rates.append(
            sorted({group["lr"] for group in optimizer.megatron.param_groups})
        )  # what ``apply`` is about to use
        return result

    with mock.patch.object(loop, "train_step", recorded):
        return {**run(), "rates": rates}
