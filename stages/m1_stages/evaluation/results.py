"""Results of evaluations on the disk. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import orjson

from m1_data.plain_values import from_plain, shown_value
from m1_data.storage.durable import write_when_there_is_room
from m1_stages.errors import DataError
from m1_stages.event_types import checked
from m1_stages.events import HeldOutMeasured, StageEvaluated
from m1_stages.run_dir import EVALUATION

Result = dict[str, Any]
"""A ``StageEvaluated`` or ``HeldOutMeasured`` as plain values."""


def result_path(run_dir: Path, stage: str) -> Path:
    """Return the path of the result of ``stage``."""
    return run_dir / EVALUATION / f"{stage}.json"


def write_result(run_dir: Path, result: StageEvaluated | HeldOutMeasured) -> None:
    """Write ``result``, replacing an earlier one."""
    path = result_path(run_dir, result.stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_when_there_is_room(path, orjson.dumps(dataclasses.asdict(result), option=orjson.OPT_INDENT_2) + b"\n")


def read_result(run_dir: Path, stage: str, checkpoint_sha256: str) -> Result | None:
    """The result of exactly that checkpoint; None when it was not evaluated, or another one was.

    Raises:
        DataError: the file is damaged: no JSON object, or a checkpoint or recall that cannot be.
    """
    path = result_path(run_dir, stage)
    if not path.is_file():
        return None
    try:
        result = _checked(orjson.loads(path.read_bytes()))
    except ValueError as error:
        raise _damaged(path, stage, error) from error
    return result if result["checkpoint_sha256"] == checkpoint_sha256 else None


def read_held_out(run_dir: Path, stage: str, checkpoint_sha256: str) -> Result | None:
    """The ``HeldOutMeasured`` of exactly that checkpoint, as plain values; None when there is none.

    Raises:
        DataError: the file is damaged.
    """
    path = result_path(run_dir, stage)
    if not path.is_file():
        return None
    try:
        result = checked(HeldOutMeasured, _object(orjson.loads(path.read_bytes())))
    except ValueError as error:
        raise _damaged(path, stage, error) from error
    return result if result["checkpoint_sha256"] == checkpoint_sha256 else None


def is_measured(run_dir: Path, stage: str, checkpoint_sha256: str) -> bool:
    """Return whether there is a result of exactly that checkpoint; a damaged one is none, and is written anew."""
    try:
        result = orjson.loads(result_path(run_dir, stage).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("checkpoint_sha256") == checkpoint_sha256


def _damaged(path: Path, stage: str, error: ValueError) -> DataError:
    return DataError(
        f"the result of an evaluation is damaged: {error}",
        where=str(path),
        fix=f"write it anew: m1 evaluate --stage {stage}",
    )


def _checked(result: Any) -> Result:
    """Check what is read of a result: the rest of the file is for people."""
    result = _object(result)
    for key in ("checkpoint_sha256", "recall"):
        if key not in result:
            raise ValueError(f"{key} is missing")
    from_plain(str, result["checkpoint_sha256"], "checkpoint_sha256")
    recall = result["recall"]
    if recall is not None and not 0 <= from_plain(float, recall, "recall") <= 1:
        raise ValueError(f"recall is {shown_value(recall)}, which is not between 0 and 1")
    return result


def _object(result: Any) -> Result:
    if not isinstance(result, dict):
        raise ValueError(f"the file is {shown_value(result)}, which is not an object")
    return result
