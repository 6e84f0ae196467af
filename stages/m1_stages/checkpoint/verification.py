"""Whether the files of a checkpoint are those of its manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from m1_stages.checkpoint.files import in_threads, sha256_of
from m1_stages.checkpoint.manifest import MANIFEST, Committed
from m1_stages.checkpoint.unpickle import check_metadata
from m1_stages.errors import CheckpointError
from m1_stages.runtime.collectives import rank, world

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
