"""Verifies the files of a checkpoint, and reads Megatron's distributed format into a state dict: several files side by side."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from m1_stages.checkpoint.files import in_threads, sha256_of
from m1_stages.checkpoint.manifest import MANIFEST, Committed
from m1_stages.checkpoint.unpickle import check_metadata, objects_restricted
from m1_stages.errors import CheckpointError
from m1_stages.runtime.collectives import rank, run_together, world

_ANOTHER = "use another checkpoint, or copy this one again"


def verify_share(committed: Committed, on_waiting: Callable[[], None]) -> None:
    """Check the names of all files, and size and SHA-256 of this rank's share, several files side by side.

    Args:
        on_waiting: called again and again meanwhile.

    Raises:
        CheckpointError: a file is missing, does not belong there, or is not what was written, or the metadata is not harmless.
    """
    import torch

    present = {p.relative_to(committed.path).as_posix() for p in committed.path.rglob("*") if p.is_file()}
    for name in sorted(present - committed.files.keys() - {MANIFEST}):
        raise CheckpointError(f"{name} does not belong to the checkpoint", where=str(committed.path))
    for name in sorted(committed.files.keys() - present):
        raise CheckpointError(f"{name} is missing", where=str(committed.path), fix=_ANOTHER)
    mine = sorted(committed.files)[rank() :: world()]
    in_threads([partial(_verify, committed, name) for name in mine], torch.get_num_threads(), on_waiting)


def _verify(committed: Committed, name: str) -> None:
    size, expected = committed.files[name]
    path = committed.path / name
    if path.stat().st_size != size or sha256_of(path) != expected:
        raise CheckpointError(f"{name} is not what was written", where=str(committed.path), fix=_ANOTHER)
    if name == ".metadata":
        check_metadata(path)


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
        with objects_restricted(), files_side_by_side():
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


@contextmanager
def files_side_by_side() -> Iterator[None]:
    """While a checkpoint is loaded, a thread of its own reads each of its files; torch's reader takes one after the other."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
    from torch.futures import Future

    def read_data(reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        per_file: dict[str, list[Any]] = {}
        for item in plan.items:
            per_file.setdefault(reader.storage_data[item.storage_index].relative_path, []).append(item)
        parts = [replace(plan, items=items) for items in per_file.values()]
        in_threads([partial(original, reader, part, planner) for part in parts], torch.get_num_threads())
        done: Future[None] = Future()
        done.set_result(None)
        return done

    original = FileSystemReader.read_data
    FileSystemReader.read_data = read_data  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FileSystemReader.read_data = original  # type: ignore[method-assign]
