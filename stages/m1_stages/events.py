"""What a run reports. Rank 0 sends each event to its sinks; ``metrics.jsonl`` is the truth.

The file holds one JSON object a line: ``{"event": "StepDone", "time": <unix seconds>, ...fields}``. ``metrics_file.JsonLines``
writes it, and ``read_events`` is the one reader, which also knows the names that fields had before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import orjson

from m1_stages.errors import DataError
from m1_stages.event_history import as_of_today
from m1_stages.event_types import checked
from m1_stages.event_values import DomainLoss, LaterStages, NeedleMap, PositionLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """A process group is up and the model is built."""

    command: str
    run_dir: str
    config_sha256: str
    preset: str
    device: str
    precision: str
    world_size: int
    topology: dict[str, int]
    parameters: int
    active_parameters: int
    versions: dict[str, str]
    backends: dict[str, str]
    """Backend of each operator and why it was chosen, in words."""
    resumed_from: str
    data: list[str]
    """What was verified of the prepared data, in words, and what else a person should know of it."""
    saves: str
    """How checkpoints are written, and the host memory that takes, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage begins or continues; what it changes and what it starts from."""

    stage: str
    title: str
    """What a person reads as the stage's name."""
    step: int
    num_steps: int
    seq_len: int
    context_tokens: int
    rope_base: float
    global_batch_rows: int
    tokens: int
    lr_peak: float
    lr_final: float
    decay_policy: str
    ramp_steps: int
    slopes_old: list[list[float]]
    slopes_new: list[list[float]]
    softmax_layers: list[int]
    """Layers whose row of slopes is unused."""
    mix: dict[str, Any]
    """What all rows of the stage hold, counted before they are trained: token shares, passes over each cell, reasons."""
    starts_from: str
    """In words: a checkpoint and what of it, or random weights."""
    recompute: bool
    """Activations are computed again in the backward pass, instead of kept."""
    offload_activations: bool
    """The inputs of recomputed layers wait in host memory."""
    activations: str
    """What becomes of the activations, in words, with the reason."""
    later: LaterStages | None = None
    """What the same command trains after this stage; None: nothing, or the run is of a version that did not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsChanged:
    """A stage goes on from a checkpoint that was made with other values; from ``step`` on the new ones hold."""

    stage: str
    step: int
    changes: list[dict[str, Any]]
    """``{"key", "old", "new"}`` of each."""
    note: str
    """Why nothing could be compared, if so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """One optimizer step."""

    stage: str
    step: int
    global_step: int
    tokens_seen: int
    loss: float
    aux_loss: float
    grad_norm: float
    layer_grad_norms: list[float]
    lr: float
    step_s: float
    """Seconds of the step alone: without saves and evaluation, and without what else lies between two steps."""
    tokens_per_s: float
    """Tokens of the step over ``step_s``."""
    ramp_progress: float
    trained_tokens: int
    metrics: dict[str, float]
    """The objective's own sums, per trained token; empty for the cross-entropy."""
    expert_load: list[list[float]] | None
    """Share of tokens per expert, [layer][expert]; None on steps where it is not gathered."""
    peak_gib: float
    """Largest memory so far: of the GPU in this stage, or of the process on a CPU."""
    sample_ids: list[int]
    half_lives: list[list[float]]
    """Shortest and longest half-life of each layer's heads, tokens; empty for softmax layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRepeated:
    """A step that was not finite was computed once more."""

    stage: str
    step: int
    global_step: int
    verdict: str
    """``transient``: finite this time, and applied; ``reproducible``: not."""
    bad_ranks: list[int]
    sample_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardNoticed:
    """The guard warned of a step or dropped it, and what was done."""

    stage: str
    step: int
    global_step: int
    action: str
    ramp: str
    reason: str
    series: str
    value: float
    median: float
    """Median of the series' window."""
    z: float
    loss: float
    grad_norm: float
    layer_grad_norms: list[float]
    ramp_progress: float
    bad_ranks: list[int]
    """Ranks whose loss was not finite."""
    sample_ids: list[int]
    """Samples of the micro-batches that were not finite, or of the whole step."""
    skipped_in_budget: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepExcluded:
    """A step whose samples a roll back excluded: its place in the order is skipped."""

    stage: str
    step: int
    global_step: int
    sample_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledBack:
    """The run continues from an older checkpoint, without the samples that went wrong."""

    stage: str
    from_step: int
    to_step: int
    checkpoint: str
    excluded_steps: list[int]
    """Steps of the stage that are not trained again."""
    sample_ids: list[int]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StragglerNoticed:
    """A rank that keeps the others waiting."""

    stage: str
    step: int
    global_step: int
    rank: int
    seconds: float
    """Seconds of its own work in a step, median of the last steps."""
    median: float
    """The same number for the ranks of its pipeline stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint was committed."""

    path: str
    stage: str
    step: int
    global_step: int
    stage_final: bool
    seconds: float
    """From the copy of the state to the commit."""
    stall_s: float
    """Seconds of these that training stood still."""
    write_s: float
    """Seconds in which the slowest rank wrote, flushed, read back and compared; the commit follows at the end of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRejected:
    """A checkpoint failed verification and was quarantined: renamed, and not used."""

    path: str
    reason: str
    quarantined_as: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveFailed:
    """A periodic checkpoint could not be written; the previous one stands."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EventsDelayed:
    """Events cannot be written now; they wait in memory and are written, in order, as soon as they can be."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished:
    """A stage's last step is done and its checkpoint committed, which may be after the next stage has begun."""

    stage: str
    steps: int
    since_step: int
    """Step of the stage at which this process began or continued it."""
    first_loss: float
    last_loss: float
    seconds: float
    """From the first of these steps to the end of the last one."""
    checkpoint: str
    ramp_progress: float
    """1 when the decay rates arrived; less when the guard held them back until the stage ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDrawn:
    """What the rows that a finished stage trained held, counted; excluded steps are not in it."""

    stage: str
    mix: dict[str, Any]
    """As in ``StageStarted``: token shares, passes over each cell, and why a target was missed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEvaluated:
    """What a stage's final checkpoint makes of a long context; also ``RUN_DIR/evaluation/STAGE.json``."""

    stage: str
    checkpoint: str
    checkpoint_sha256: str
    """Hash of the checkpoint's manifest."""
    global_step: int
    seq_len: int
    recall: float | None
    """Share of value tokens that are the likeliest token, mean over the map; None when nothing could be measured."""
    needles: NeedleMap | None
    positions: PositionLoss | None
    skipped: list[str]
    """What was not measured, and why."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutMeasured:
    """What the final checkpoint of fine-tuning makes of the conversations held out; also ``RUN_DIR/evaluation/STAGE.json``."""

    stage: str
    checkpoint: str
    checkpoint_sha256: str
    """Hash of the checkpoint's manifest."""
    global_step: int
    loss: float
    """Mean over the trained tokens of all domains, nats."""
    domains: list[DomainLoss]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GateForced:
    """A stage starts although the one before recalls too little."""

    stage: str
    before: str
    recall: float | None
    """None: it was not evaluated."""
    gate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStopped:
    """The process is about to leave."""

    reason: str
    exit_code: int
    wall_s: dict[str, float]
    """Seconds of this process by phase: start (imports, checks), join, build (model, loading), data, train, save, evaluate."""


Event = (
    RunStarted
    | StageStarted
    | SettingsChanged
    | StepDone
    | StepRepeated
    | GuardNoticed
    | StepExcluded
    | RolledBack
    | StragglerNoticed
    | CheckpointSaved
    | CheckpointRejected
    | SaveFailed
    | EventsDelayed
    | StageFinished
    | StageDrawn
    | StageEvaluated
    | HeldOutMeasured
    | GateForced
    | RunStopped
)
_EVENTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}
Sink = Callable[[Event], None]
Record = dict[str, Any]
"""An event as plain values, with its name under ``event`` and its time under ``time``."""


def read_events(path: Path, *, skip_damaged: bool = False) -> Iterator[Record]:
    """Read a ``metrics.jsonl`` in order, with today's names of events and fields; numbers that were not finite are NaN.

    The torn last line of a run that was killed is skipped; a missing file has no events.

    Args:
        skip_damaged: skip every damaged line, not only the last one.

    Raises:
        DataError: a line that is not the last one is damaged.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = _checked(as_of_today(orjson.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if skip_damaged or number == len(lines):
                continue
            raise DataError(f"a damaged line: {error}", where=f"{path}:{number}", fix="remove that line") from error
        yield record


def _checked(record: Record) -> Record:
    kind = _EVENTS.get(record["event"])
    return record if kind is None else checked(kind, record)
