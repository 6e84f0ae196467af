"""Names of the files and folders in a run directory, who writes them, and whether a folder may become one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from m1_data.errors import ConfigError
from m1_data.storage.ownership import refuse_unusable

LOCK = "run.lock"
"""Names the command that writes here now (``m1_data.storage.lock``)."""

METRICS = "metrics.jsonl"
"""Events, one JSON object a line (``m1_stages.events``)."""
CHECKPOINTS = "checkpoints"
"""Committed checkpoints (``m1_stages.checkpoint``)."""
IMPORTED = "imported"
"""Tokenizer, chat template and configurations of an imported model (``m1 import``)."""
ROLLBACKS = "rollbacks.json"
"""Roll backs and the steps they excluded (``m1_stages.training.rollback``)."""
EVALUATION = "evaluation"
"""``STAGE.json`` of each evaluated stage (``m1_stages.evaluation.results``)."""
SFT_DATA = "sft-data"
"""The conversations of ``m1 sft``, tokenized (``m1_data.sft.store``); ``sft-data-NAME`` are those of a named run."""
RANKS = "ranks"
"""Heartbeats of the running ranks (``m1_stages.runtime.watchdog``)."""
STACKS = "stacks"
"""Stacks of ranks that stopped or crashed (``m1_stages.runtime.watchdog``)."""
TENSORBOARD = "tensorboard"
"""TensorBoard events (``m1 pretrain`` and ``m1 sft`` with ``run.tensorboard``)."""
REPORT = "report.html"
"""The page that ``m1 report`` writes."""
EXPORT_PREFIX = "export-"
"""``export-STAGE``: what ``m1 export`` writes unless it is given another folder."""


def refuse_foreign_run_dir(run_dir: Path) -> None:
    """Refuse a run directory in which one of our names belongs to somebody else; other names in it do not matter.

    Raises:
        ConfigError: it is no folder, cannot become one, or has such a file or folder. Nothing was written.
    """
    fix = 'give run.dir a folder of its own, for example run.dir = "run"'
    refuse_unusable(run_dir / METRICS, what="run.dir", fix=fix)
    if run_dir.is_symlink() and not run_dir.exists():
        raise ConfigError("run.dir is a link that leads nowhere", where=f"{run_dir}, key run.dir", fix=fix)
    for name, is_ours in ((METRICS, _are_events), (CHECKPOINTS, _are_checkpoints), (ROLLBACKS, _is_file)):
        path = run_dir / name
        try:
            foreign = os.path.lexists(path) and not is_ours(path)
        except OSError as error:
            raise ConfigError(f"run.dir cannot be used: {error}", where=f"{path}, key run.dir", fix=fix) from error
        if foreign:
            raise ConfigError(f"run.dir has a {name!r} that m1 did not write", where=f"{path}, key run.dir", fix=fix)
    for name in (IMPORTED, EVALUATION, SFT_DATA, RANKS, STACKS, TENSORBOARD):
        if os.path.lexists(run_dir / name) and not (run_dir / name).is_dir():
            raise ConfigError(f"run.dir has a file {name!r}", where=f"{run_dir / name}, key run.dir", fix=fix)


def _are_events(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    if not first.endswith(b"\n"):
        return not first or first.startswith(b'{"event":')  # the first line was torn
    try:
        return "event" in json.loads(first)
    except (ValueError, TypeError):
        return first.startswith(b'{"event":')  # its reader names the damage


def _are_checkpoints(path: Path) -> bool:
    entries = [entry.name for entry in path.iterdir()] if path.is_dir() else ["no folder"]
    return not entries or any(name == "LATEST" or name.startswith("step_") for name in entries)


def _is_file(path: Path) -> bool:
    return path.is_file()
