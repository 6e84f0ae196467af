"""Runs ``m1 pretrain``'s job once and asks it to stop at one place.

Usage: python stop_worker.py CONFIG STAGES PLACE
PLACE: data, forward, micro-batch, save, evaluate, or none; the process sends itself a SIGTERM there, once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m1_data.sampling.loader import PackedDataset
from m1_stages.config.load import load_config
from m1_stages.curriculum import stages_of
from m1_stages.errors import M1Error
from m1_stages.evaluation import stage_evaluation
from m1_stages.jobs import pretrain
from m1_stages.training.checkpointer import Checkpointer
from m1_stages.training.objective import NextTokenCrossEntropy

PLACES: dict[str, tuple[Any, str, int]] = {
    "data": (PackedDataset, "batch", 2),
    "forward": (NextTokenCrossEntropy, "forward", 1),
    "micro-batch": (NextTokenCrossEntropy, "loss", 3),
    "save": (Checkpointer, "_begin", 1),
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


def main(config: str, stages: str, place: str) -> int:
    if place != "none":
        interrupt(*PLACES[place])
    try:
        pretrain.run(load_config(Path(config)), stages_of(stages), [])
    except M1Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
