"""``metrics.jsonl`` has one reader: it knows former names, skips a torn last line, and names a damaged one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.records import record

from m1_stages.errors import CheckpointError, DataError
from m1_stages.events import RunStopped, StageEvaluated, StageFinished, StepDone, StragglerNoticed, read_events
from m1_stages.metrics_file import JsonLines
from m1_stages.training.rollback import RollbackRecord, read_rollbacks
from m1_stages.training.train_state import TrainState

VERSION_0_1 = Path(__file__).parents[1] / "faults" / "frozen" / "metrics-0.1.0.jsonl"
"""An event of each kind, written by version 0.1.0."""


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_events_of_version_0_1_are_read_with_the_names_and_fields_of_today() -> None:
    before = [json.loads(line) for line in VERSION_0_1.read_text().splitlines()]
    now = {record["event"]: record for record in read_events(VERSION_0_1)}
    assert len(now) == len(before) == 15
    assert now["StageStarted"]["starts_from"] == before[1]["takes_over"]
    assert (now["StageStarted"]["title"], now["RunStarted"]["backends"], now["RunStarted"]["data"]) == ("", {}, [])
    assert now["StepDone"] == before[2] | {"metrics": {}}
    assert now["GuardNoticed"]["median"] == before[4]["usual"]
    assert now["StepExcluded"] == before[5] | {"event": "StepExcluded"}
    assert now["RolledBack"]["excluded_steps"] == before[6]["left_out"]
    assert now["StragglerNoticed"]["median"] == before[7]["usual"]
    assert now["StageEvaluated"] == before[12]


def test_a_line_without_a_field_is_damage(tmp_path: Path) -> None:
    whole = record(StepDone)
    for name in whole.keys() - {"event", "time", "metrics"}:
        path = write(
            tmp_path / "metrics.jsonl", json.dumps({k: v for k, v in whole.items() if k != name}), json.dumps(whole)
        )
        with pytest.raises(DataError, match=f"a damaged line: {name} is missing") as caught:
            list(read_events(path))
        assert caught.value.where == f"{path}:1"


def test_a_number_that_was_not_finite_is_nan_again(tmp_path: Path) -> None:
    written = [record(StepDone, loss=None, layer_grad_norms=[0.5, None]), record(StageEvaluated, recall=None)]
    step, evaluated = read_events(write(tmp_path / "metrics.jsonl", *map(json.dumps, written)))
    assert math.isnan(step["loss"])
    assert step["layer_grad_norms"] == [0.5, pytest.approx(math.nan, nan_ok=True)]
    assert evaluated["recall"] is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink(StragglerNoticed(stage="32k", step=1, global_step=2, rank=3, seconds=0.5, median=0.25))
    sink.close()
    (found,) = read_events(tmp_path / "metrics.jsonl")
    assert found.pop("time") > 0
    assert found == {
        "event": "StragglerNoticed", "stage": "32k", "step": 1, "global_step": 2, "rank": 3, "seconds": 0.5, "median": 0.25,
    }  # fmt: skip


def test_no_file_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "metrics.jsonl")) == []


@pytest.mark.parametrize("damaged", ['{"event": "Step', "[1]", "{}", "7", "\x00"])
def test_a_torn_last_line_is_skipped_and_a_damaged_one_named(tmp_path: Path, damaged: str) -> None:
    good = json.dumps(record(RunStopped))
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
    saved = {"stage": "32k", "data_fingerprint": "d", "to_global_step": 6, "left_out": [7, 8], "reason": "spike"}
    (tmp_path / "rollbacks.json").write_text(json.dumps([saved | {"ramp_progress": 0.5}, saved]))
    assert read_rollbacks(tmp_path, "32k", "d", 9) == [
        RollbackRecord("32k", "d", 6, (7, 8), "spike", 0.5),
        RollbackRecord("32k", "d", 6, (7, 8), "spike", 1.0),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"), (b"\xff\xfe[]", "utf-8"), (b"[" * 100_000, "recursion"),
        (b"{}", "the file is {}, which is not a list"),
        (b'["\\u001b[31m"]', r"\[0\] is '\\x1b\[31m', which is not an object"), (b"[{}]", r"\[0\].stage is missing"),
        (b'[{%s, "excluded_steps": [[1]]}]', r"excluded_steps\[0\] is \[1\]"), (b'[{%s, "excluded_steps": [-1]}]', "is -1"),
        (b'[{%s, "excluded_steps": [1], "ramp_progress": 1.5}]', "ramp_progress is 1.5, which is not between 0 and 1"),
        (b'[{%s, "excluded_steps": [8, 9]}]', "it excludes step 9 of stage 32k, which has 9 steps"),
        (b'[{%s, "excluded_steps": [1], "other": 1}]', r"unknown key '\[0\].other'"),
    ],
    ids=range(11),
)  # fmt: skip
def test_damaged_roll_backs_are_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    fields = b'"stage": "32k", "data_fingerprint": "d", "to_global_step": 6, "reason": "spike"'
    (tmp_path / "rollbacks.json").write_bytes(content.replace(b"%s", fields))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_rollbacks(tmp_path, "32k", "d", 9)
    assert caught.value.where == str(tmp_path / "rollbacks.json")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (record(StepDone) | {"step": "\x1b[31m"}, r"step is '\\x1b\[31m', which is not int"),
        (record(StepDone) | {"step": True}, "step is True"),
        (record(StageEvaluated) | {"needles": 7}, "needles is 7"),
        (record(StageEvaluated) | {"needles": {"lengths": [1]}}, "needles.depths is missing"),
        (record(StageFinished) | {"stage": {}}, "stage is {}"),
    ],
    ids=range(5),
)
def test_a_value_of_another_type_is_damage(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "metrics.jsonl", json.dumps(line), json.dumps(record(StepDone, step=1)))
    with pytest.raises(DataError, match=message) as caught:
        list(read_events(path))
    assert str(caught.value).isprintable()
    assert [found["step"] for found in read_events(path, skip_damaged=True)] == [1]
