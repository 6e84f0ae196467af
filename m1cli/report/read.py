"""The events of a run, sorted for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from m1_stages.errors import DataError
from m1_stages.events import Record, read_events
from m1_stages.run_dir import METRICS

_LISTED = (
    "CheckpointRejected",
    "SaveFailed",
    "EventsDelayed",
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
    """Events worth a line in the report's list."""


def read_history(run_dir: Path) -> History:
    """Read a run's events.

    Raises:
        DataError: there is no such file, nothing in it, or a damaged line that is not the last.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise DataError("this run has reported nothing yet", where=str(path), fix="run m1 pretrain first")
    history, steps = History(), {}
    for record in read_events(path):
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
