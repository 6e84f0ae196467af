"""Reads Megatron's distributed checkpoint into a state dict."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m1_stages.checkpoint.unpickle import objects_restricted
from m1_stages.errors import CheckpointError
from m1_stages.runtime.collectives import run_together


def load_verified(path: Path, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a checkpoint whose files are what was written; collective.

    Each rank reads for itself: one that must not unpickle its part has to say so to the others.

    Args:
        build: makes the sharded state dict to load into.

    Raises:
        CheckpointError: on every rank, where one found an object that must not be unpickled. Whatever else stops a rank (no
            memory, another shape) is not the checkpoint's fault and passes through, on that rank alone.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    loaded: dict[str, Any] = {}
    failure: BaseException | None = None
    try:
        with objects_restricted():
            loaded = dist_checkpointing.load(build(), str(path))
    except (pickle.UnpicklingError, CheckpointException) as error:
        failure = _refused(error)

    def refuse() -> None:
        if isinstance(failure, CheckpointError):
            raise failure

    run_together(refuse)
    if failure is not None:
        raise failure
    return loaded


def _refused(error: BaseException) -> BaseException:
    """The error of a checkpoint that must not be unpickled; any other error as it is."""
    found = [error, *(wrapped for wrapped, _ in getattr(error, "failures", {}).values())]
    for one in found:
        if isinstance(one, pickle.UnpicklingError):
            return CheckpointError(f"refused to unpickle it: {str(one).splitlines()[0]}")
    return error
