"""``metrics.jsonl`` as plain values; the torn last line of a killed run is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from m1_stages.config import METRICS
from m1_stages.errors import DataError

Record = dict[str, Any]
_LISTED = (
    "CheckpointRejected",
    "SaveFailed",
    "GateForced",
    "GuardNoticed",
    "StepRepeated",
    "RolledBack",
    "StragglerNoticed",
)


@dataclass(slots=True)
class History:
    """What a run reported, in order."""

    starts: list[Record] = field(default_factory=list)
    stages: dict[str, Record] = field(default_factory=dict)
    """The last ``StageStarted`` of each stage, in order of first appearance."""
    steps: dict[str, list[Record]] = field(default_factory=dict)
    """Steps by stage; a step repeated after a resume counts once, the last time."""
    finished: dict[str, Record] = field(default_factory=dict)
    evaluated: dict[str, Record] = field(default_factory=dict)
    """The last ``StageEvaluated`` of each stage."""
    held: dict[str, int] = field(default_factory=dict)
    """Steps of each stage in which the guard held the decay ramp, too many for a line each."""
    other: list[Record] = field(default_factory=list)
    """Everything worth a line in the list of events."""


def read_history(run_dir: Path) -> History:
    """Read a run's events.

    Raises:
        DataError: there is no such file, nothing in it, or a damaged line that is not the last.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise DataError("this run has reported nothing yet", where=str(path), fix="run m1 pretrain first")
    lines = path.read_bytes().splitlines()
    history, steps = History(), {}
    for number, line in enumerate(lines, 1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"a damaged line: {error}", where=f"{path}:{number}", fix="remove that line") from error
        kind = record["event"]
        if kind == "StepDone":
            steps[record["global_step"]] = record
        elif kind == "StageStarted":
            history.stages[record["stage"]] = record
            if record["step"]:
                history.other.append(record)
        elif kind == "StageFinished":
            history.finished[record["stage"]] = record
        elif kind == "StageEvaluated":
            history.evaluated[record["stage"]] = record
        elif kind == "RunStarted":
            history.starts.append(record)
        elif kind == "GuardNoticed" and record["action"] == "apply" and record["ramp"] != "reverse":
            history.held[record["stage"]] = history.held.get(record["stage"], 0) + 1
        elif kind in _LISTED or (kind == "RunStopped" and record["exit_code"]):
            history.other.append(record)
    for _, record in sorted(steps.items()):
        history.steps.setdefault(record["stage"], []).append(record)
    if not steps:
        raise DataError("this run has not finished a step yet", where=str(path), fix="run m1 pretrain first")
    return history
