"""Events that earlier versions wrote, by the names and with the fields of today: files of older runs stay readable."""

from __future__ import annotations

from typing import Any

_RENAMED_EVENTS = {"StepLeftOut": "StepExcluded"}
_RENAMED_FIELDS = {
    "StageStarted": {"takes_over": "starts_from"},
    "GuardNoticed": {"usual": "median"},
    "RolledBack": {"left_out": "excluded_steps"},
    "StragglerNoticed": {"usual": "median"},
}
"""Old to new names, by the new name of the event."""
_ADDED_FIELDS: dict[str, dict[str, Any]] = {
    "RunStarted": {"backends": {}, "data": [], "saves": ""},
    "RunStopped": {"wall_s": {}},
    "CheckpointSaved": {"write_s": 0.0},
    "StageFinished": {"since_step": 0},
    "StageStarted": {"title": "", "later": None},
    "StepDone": {"metrics": {}},
}
"""Fields that version 0.1 did not write, and what stands for them; a new field of an event is listed here."""


def as_of_today(record: dict[str, Any]) -> dict[str, Any]:
    """Return an event of ``metrics.jsonl``, as any version wrote it, with today's names and fields.

    Raises:
        KeyError, TypeError, AttributeError: it is no event.
    """
    name: str = record["event"]
    name = _RENAMED_EVENTS.get(name, name)
    fields = _RENAMED_FIELDS.get(name, {})
    present = {fields.get(key, key): value for key, value in record.items()}
    return _ADDED_FIELDS.get(name, {}) | present | {"event": name}
