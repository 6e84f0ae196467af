"""Names of the directories of checkpoints: committed, being written, left behind, put aside."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

from m1_stages.checkpoint.manifest import CheckpointMeta, Committed
from m1_stages.config.sft_runs import is_sft

_STEP = re.compile(r"step_(\d{8,})(-[a-z0-9_-]+)?$")
_LEFT_BEHIND = re.compile(r"step_\d{8,}(-[a-z0-9_-]+)?\.tmp-([0-9a-f]{8}|removed)$")


def directory_for(root: Path, meta: CheckpointMeta, committed: Sequence[Committed]) -> Path:
    """Return where a checkpoint is committed.

    Two stages can have the same global step: fine-tuning and the next stage of pretraining start from one. The second is
    named after its stage, too.
    """
    path = root / f"step_{meta.global_step:08d}"
    if any(c.path == path and c.meta.stage != meta.stage for c in committed):
        return path.with_name(f"{path.name}-{meta.stage}")
    return path


def temporary_name(path: Path) -> Path:
    """Return a new name for the directory in which ``path`` is written."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def step_directories(root: Path) -> list[Path]:
    """Directories named like a committed checkpoint; empty when there is no ``root``."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and _STEP.match(path.name))


def left_behind(root: Path) -> list[Path]:
    """Directories that interrupted saves and removals left below ``root``."""
    return [path for path in root.iterdir() if _LEFT_BEHIND.match(path.name)] if root.is_dir() else []


def free_name(path: Path, word: str) -> Path:
    """Return ``<path>.<word>-<n>`` with the first number that is free."""
    number = 1
    while (moved := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return moved


def replaced(committed: Sequence[Committed], verified: Collection[Path], keep_last: int) -> list[Committed]:
    """Return the checkpoints that are not needed any more: no final ones, and none before two are known to be good.

    Args:
        committed: newest first.
        verified: whose files this process has found to be what was written.
        keep_last: unfinished-stage checkpoints kept, in all and of each unfinished fine-tuning.
    """
    good = list(islice((c for c in committed if c.path in verified and _is_complete(c)), 2))
    if len(good) < 2:
        return []
    passing = [c for c in committed if not c.meta.stage_final]
    ended = {c.meta.stage for c in committed if c.meta.stage_final}
    needed = passing[:keep_last]
    for stage in {c.meta.stage for c in passing if is_sft(c.meta.stage)} - ended:
        needed += [c for c in passing if c.meta.stage == stage][:keep_last]  # another fine-tuning may go on meanwhile
    return [old for old in passing if old not in needed and old.meta.global_step < good[1].meta.global_step]


def _is_complete(committed: Committed) -> bool:
    """Whether every file is there in its size."""
    try:
        return all((committed.path / name).stat().st_size == size for name, (size, _) in committed.files.items())
    except OSError:
        return False
