"""Saves checkpoints in children that kill themselves at one point each; the imports are paid once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m1_stages.checkpoint import CheckpointStore
from m1_stages.checkpoint import snapshot as write
from m1_stages.checkpoint import store as store_module
from m1_stages.config import ParallelConfig
from m1_stages.runtime import device, parallel

DEVICE = device.use("cpu")

from megatron.core import dist_checkpointing  # noqa: E402, F401 - before the first fork
from support.tiny_checkpoint import save  # noqa: E402


def die(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def before_writing(name: str) -> Callable[[Path, str], None]:
    original = store_module.write_atomically

    def write_atomically(path: Path, text: str) -> None:
        if path.name == name:
            die()
        original(path, text)

    return write_atomically


POINTS: dict[str, Callable[[], None]] = {
    "in the snapshot": lambda: setattr(write.Snapshot, "copy", die),
    "in the writer": lambda: setattr(write.HashedFile, "commit", die),
    "before the manifest": lambda: setattr(store_module, "write_atomically", before_writing("MANIFEST.json")),
    "before the rename": lambda: setattr(Path, "rename", die),
    "before LATEST": lambda: setattr(store_module, "write_atomically", before_writing("LATEST")),
}


def attempt(root: Path, spoil: Callable[[], None]) -> None:
    parallel.start(ParallelConfig(), device=DEVICE, seed=1)
    store = CheckpointStore(root)
    for step in (10, 20):
        save(store, step)
    spoil()
    save(store, 30)


def kill_at_each_point(job: dict[str, Any]) -> dict[str, int]:
    """The exit code of a child that kills itself at each of ``POINTS``; below ``root``/<number> steps 10 and 20 are committed."""
    codes = {}
    for number, (name, spoil) in enumerate(POINTS.items()):
        child = os.fork()
        if child == 0:
            try:
                attempt(Path(job["root"]) / str(number), spoil)
            finally:
                os._exit(1)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return codes
