"""The events of a run, sorted for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from m1_data.sampling.mix_report import Share
from m1_data.sft.stats import SFTStats
from m1_stages.config.sft_runs import is_sft
from m1_stages.errors import DataError
from m1_stages.event_types import checked
from m1_stages.events import Record, read_events
from m1_stages.run_dir import METRICS

_NONE_COUNTED: Record = {"conversations": 0, "reflective": 0, "trained_tokens": 0, "matches": {}}
_BEFORE_SELECTION: Record = {
    "files": [], "bad_rows": {}, "domains": [], "held_out": 0, "left_out": 0,
    "before_selection": _NONE_COUNTED, "after_selection": _NONE_COUNTED,
}  # fmt: skip
"""What earlier runs did not record: they read OpenAI messages, and trained every conversation once a pass."""

LISTED = (
    "CheckpointRejected",
    "SaveFailed",
    "EventsDelayed",
    "GateForced",
    "GuardNoticed",
    "StepRepeated",
    "RolledBack",
    "StragglerNoticed",
)
"""Events that have a line each in the report's list."""
_TIMED = ("StageStarted", "StepDone", "StageFinished")


@dataclass(frozen=True, slots=True)
class _Passes:
    source: str
    bucket: str
    epochs: float


@dataclass(frozen=True, slots=True)
class _Mix:
    """What the report shows of a stage's mix, out of ``MixReport.as_dict``."""

    length_classes: dict[str, Share]
    domains: dict[str, Share]
    core: Share
    epochs: list[_Passes]


@dataclass(slots=True)
class History:
    """What a run reported, in order."""

    starts: list[Record] = field(default_factory=list)
    stages: dict[str, Record] = field(default_factory=dict)
    """The last ``StageStarted`` of each stage, in order of first appearance."""
    steps: dict[str, list[Record]] = field(default_factory=dict)
    """Steps by stage; a step repeated after a resume counts once, the last time."""
    finished: dict[str, Record] = field(default_factory=dict)
    drawn: dict[str, Record] = field(default_factory=dict)
    """The last ``StageDrawn`` of each stage."""
    evaluated: dict[str, Record] = field(default_factory=dict)
    """The last ``StageEvaluated`` of each stage."""
    held_out: dict[str, Record] = field(default_factory=dict)
    """The last ``HeldOutMeasured`` of each stage."""
    clock_s: dict[str, float] = field(default_factory=dict)
    """Seconds by the clock of each stage, from its start to its last step or save: steps, those repeated too, saves, waiting."""
    wall_s: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of all processes that could say so when they ended."""
    held: dict[str, int] = field(default_factory=dict)
    """Steps of each stage in which the guard held the decay ramp, too many for a line each."""
    other: list[Record] = field(default_factory=list)
    """Events worth a line in the report's list."""

    def mixes(self) -> dict[str, Record]:
        """Return what each stage drew, by a name that says when it is still to draw some of it."""
        found = {}
        for stage, started in self.stages.items():
            mix = self.drawn[stage]["mix"] if stage in self.drawn else started["mix"]
            if "length_classes" in mix:
                found[stage if stage in self.drawn else f"{stage} (planned)"] = mix
        return found


def read_history(run_dir: Path) -> History:
    """Read a run's events.

    Raises:
        DataError: there is no such file, nothing in it, a damaged line that is not the last, or lines that do not belong
            together.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise DataError("this run has reported nothing yet", where=str(path), fix="run m1 pretrain first")
    history, last, stage = History(), 0.0, ""
    steps: dict[tuple[str, int], Record] = {}
    for record in read_events(path):
        kind = record["event"]
        if kind == "StageStarted":
            stage = record["stage"]
        if kind in _TIMED and record["stage"] == stage:  # a stage may be finished beside the next one
            now = _time_of(record, path)
            if kind != "StageStarted":
                history.clock_s[stage] = history.clock_s.get(stage, 0.0) + now - last
            last = now
        if kind == "RunStopped":
            for phase, seconds in record["wall_s"].items():
                history.wall_s[phase] = history.wall_s.get(phase, 0.0) + seconds
        if kind == "StepDone":
            steps[_branch(record["stage"]), record["global_step"]] = record
        elif kind == "StageStarted":
            history.stages[record["stage"]] = _drawable(record, path)
            if record["step"]:
                history.other.append(record)
        elif kind == "StageFinished":
            history.finished[record["stage"]] = record
        elif kind == "StageDrawn":
            history.drawn[record["stage"]] = _drawable(record, path)
        elif kind == "StageEvaluated":
            history.evaluated[record["stage"]] = _rectangular(record, path)
        elif kind == "HeldOutMeasured":
            history.held_out[record["stage"]] = record
        elif kind == "RunStarted":
            history.starts.append(record)
        elif kind == "GuardNoticed" and record["action"] == "apply" and record["ramp"] != "reverse":
            history.held[record["stage"]] = history.held.get(record["stage"], 0) + 1
        elif kind in LISTED or (kind == "RunStopped" and record["exit_code"]):
            history.other.append(record)
    for record in sorted(steps.values(), key=lambda r: r["global_step"]):
        history.steps.setdefault(record["stage"], []).append(record)
    if not steps:
        raise DataError("this run has not finished a step yet", where=str(path), fix="run m1 pretrain first")
    missing = [f"StageStarted of stage {stage}" for stage in history.steps if stage not in history.stages]
    missing += ["RunStarted"] * (not history.starts)
    if missing:
        raise DataError(
            f"the events are damaged: there are steps, and no {missing[0]}",
            where=str(path),
            fix="restore the file from a copy, or move it away: the next m1 pretrain begins a new one",
        )
    return history


def _branch(stage: str) -> str:
    """Stages of pretraining follow each other, one step after another; a fine-tuning has the steps of what goes on beside it."""
    return stage if is_sft(stage) else ""


def _time_of(record: Record, path: Path) -> float:
    time = record.get("time")
    if not isinstance(time, (int, float)):
        raise DataError(f"an event {record['event']} without its time", where=str(path), fix="remove that line")
    return time


def _drawable(stage: Record, path: Path) -> Record:
    """Refuse a stage whose decay rates or mix cannot be: both are drawn."""
    mix = stage["mix"]
    try:
        if "length_classes" in mix:
            mix = checked(_Mix, mix)
        elif "read" in mix:
            files = [{"weight": 1.0, "drawn": 0} | file for file in mix.get("files", [])]
            mix = checked(SFTStats, _BEFORE_SELECTION | {"samples": mix["read"]} | mix | {"files": files})
        if any(not rate > 0 for row in stage.get("slopes_new", []) for rate in row):
            raise ValueError("slopes_new has a decay rate that is not above 0")
    except ValueError as error:
        raise DataError(
            f"the {stage['event']} of stage {stage['stage']} is damaged: {error}",
            where=str(path),
            fix="remove that line",
        ) from error
    return stage | {"mix": mix}


def _rectangular(evaluated: Record, path: Path) -> Record:
    """Refuse an evaluation whose lists do not belong together."""
    needles, positions = evaluated.get("needles"), evaluated.get("positions")
    fits = True
    if needles:
        lengths, depths = len(needles["lengths"]), len(needles["depths"])
        grids = [needles[name] for name in ("recall", "exact", "loss")]
        fits = all(len(grid) == lengths and all(len(row) == depths for row in grid) for grid in grids)
        fits = fits and len(needles["control_recall"]) == len(needles["control_loss"]) == lengths > 0 < depths
    if positions:
        fits = fits and len({len(values) for values in positions.values() if isinstance(values, list)}) == 1
    if not fits:
        raise DataError(
            f"the evaluation of stage {evaluated['stage']} is damaged: its lists have lengths that do not belong together",
            where=str(path),
            fix=f"measure again: m1 evaluate --stage {evaluated['stage']}",
        )
    return evaluated
