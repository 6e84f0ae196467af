"""``metrics.jsonl`` has one reader: it knows former names, skips a torn last line, and names a damaged one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m1_stages.errors import DataError
from m1_stages.events import StragglerNoticed, read_events
from m1_stages.metrics_file import JsonLines
from m1_stages.training.rollback import RollbackRecord, _read
from m1_stages.training.train_state import TrainState

FORMER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"event": "StageStarted", "takes_over": "nothing"}, {"event": "StageStarted", "starts_from": "nothing"}),
    ({"event": "GuardNoticed", "usual": 0.5, "z": 7.0}, {"event": "GuardNoticed", "median": 0.5, "z": 7.0}),
    ({"event": "RolledBack", "left_out": [3]}, {"event": "RolledBack", "excluded_steps": [3]}),
    ({"event": "StepLeftOut", "step": 3}, {"event": "StepExcluded", "step": 3}),
    ({"event": "StragglerNoticed", "usual": 0.1}, {"event": "StragglerNoticed", "median": 0.1}),
    ({"event": "StepDone", "usual": 1}, {"event": "StepDone", "usual": 1}),
]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_former_names_are_read_as_present_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", *(json.dumps(before) for before, _ in FORMER))
    assert list(read_events(path)) == [after for _, after in FORMER]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink(StragglerNoticed(stage="32k", step=1, global_step=2, rank=3, seconds=0.5, median=0.25))
    sink.close()
    (record,) = read_events(tmp_path / "metrics.jsonl")
    assert record.pop("time") > 0
    assert record == {
        "event": "StragglerNoticed", "stage": "32k", "step": 1, "global_step": 2, "rank": 3, "seconds": 0.5, "median": 0.25,
    }  # fmt: skip


def test_no_file_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "metrics.jsonl")) == []


@pytest.mark.parametrize("damaged", ['{"event": "Step', "[1]", "{}", "7", "\x00"])
def test_a_torn_last_line_is_skipped_and_a_damaged_one_named(tmp_path: Path, damaged: str) -> None:
    good = json.dumps({"event": "RunStopped", "exit_code": 0})
    assert len(list(read_events(write(tmp_path / "torn", good, damaged)))) == 1
    path = write(tmp_path / "damaged", good, damaged, good)
    with pytest.raises(DataError, match="a damaged line") as caught:
        list(read_events(path))
    assert caught.value.where == f"{path}:2"
    assert len(list(read_events(path, skip_damaged=True))) == 2


def test_checkpoints_with_former_names_are_read() -> None:
    saved = TrainState(stage="32k", excluded_steps=[4]).as_dict()
    saved["left_out"] = saved.pop("excluded_steps")
    saved["guard"] |= {"in_a_row": 2, "calm": 5}
    del saved["guard"]["consecutive"], saved["guard"]["in_band_steps"]
    state = TrainState.from_dict(saved)
    assert state.excluded_steps == [4]
    assert (state.guard.consecutive, state.guard.in_band_steps) == (2, 5)


def test_roll_backs_with_former_names_are_read(tmp_path: Path) -> None:
    record = {"stage": "32k", "data_fingerprint": "d", "to_global_step": 6, "left_out": [7, 8], "reason": "spike"}
    (tmp_path / "rollbacks.json").write_text(json.dumps([record | {"ramp_progress": 0.5}, record]))
    assert _read(tmp_path) == [
        RollbackRecord("32k", "d", 6, [7, 8], "spike", 0.5),
        RollbackRecord("32k", "d", 6, [7, 8], "spike", 1.0),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "StepDone", "step": "\\u001b[31m"}', r"step is '\\x1b\[31m', which is not int"),
        ('{"event": "StepDone", "step": true}', "step is True"),
        ('{"event": "StageEvaluated", "needles": 7}', "needles is 7"),
        ('{"event": "StageEvaluated", "needles": {"lengths": [1]}}', "needles.depths is missing"),
        ('{"event": "StageFinished", "stage": {}}', "stage is {}"),
    ],
)
def test_a_value_of_another_type_is_damage(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "metrics.jsonl", line, '{"event": "StepDone", "step": 1, "loss": null}')
    with pytest.raises(DataError, match=message) as caught:
        list(read_events(path))
    assert str(caught.value).isprintable()
    assert [record["step"] for record in read_events(path, skip_damaged=True)] == [1]
