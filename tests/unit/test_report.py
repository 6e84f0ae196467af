"""The report on a synthetic run: values on the page, resumes, torn lines."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from rich.console import Console
from support.records import record
from support.run_events import MIX
from support.run_events import run_started as started
from support.run_events import stage_started as stage
from support.run_events import step_done as step

from m1_stages.errors import DataError
from m1_stages.event_values import DomainLoss, NeedleMap, PositionLoss
from m1_stages.events import (
    Event,
    GateForced,
    GuardNoticed,
    HeldOutMeasured,
    RunStopped,
    StageEvaluated,
    StageFinished,
    StepRepeated,
)
from m1_stages.metrics_file import JsonLines
from m1cli.evaluation import evaluation_view
from m1cli.report.figures import expert_load, layer_norms, needle_maps, over_tokens, position_losses
from m1cli.report.html import write_report
from m1cli.report.read import LISTED, read_history


def write_run(folder: Path) -> None:
    lines = JsonLines(folder / "metrics.jsonl")
    for event in (started(), stage("32k"), *(step("32k", n) for n in range(7))):
        lines(event)
    lines.close()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "StepDone", "stage": "32k", "gl')  # what a SIGKILL in the middle of a write leaves
    lines = JsonLines(folder / "metrics.jsonl")
    for event in (started(), stage("32k", 5), step("32k", 5, loss=1.5), *(step("32k", n) for n in range(6, 10))):
        lines(event)
    lines(
        StageFinished(
            stage="32k",
            steps=10,
            since_step=5,
            first_loss=7.0,
            last_loss=6.1,
            seconds=5.0,
            checkpoint="step_00000010",
            ramp_progress=1.0,
        )
    )
    lines.close()


def test_a_resumed_run_counts_every_step_once_and_the_last_one_wins(tmp_path: Path) -> None:
    write_run(tmp_path)
    history = read_history(tmp_path)
    assert [s["step"] for s in history.steps["32k"]] == list(range(10))
    assert history.steps["32k"][5]["loss"] == 1.5
    assert len(history.starts) == 2
    assert [r["step"] for r in history.other] == [5]


def test_the_page_stands_alone_and_shows_the_values(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path, None, tmp_path / "new" / "report.html").read_text()
    assert not re.search(r'<script[^>]+src=|<link[^>]+href="http', page), "nothing is loaded from elsewhere"
    text = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    for shown in ("2.0M", "0.5M", "10 / 10", "5,120", "6.800", "continued stage 32k at step 5"):
        assert shown in text, shown
    last_five = (1.5 + 6.4 + 6.3 + 6.2 + 6.1) / 5
    assert f"{last_five:.3f}" in text


def test_time_by_the_clock_has_saves_and_repeated_steps_in_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines() if not line.endswith('"gl')]
    for n, event in enumerate(records):
        # Each step takes 2 s; between the two processes there is an hour; the last save takes 9 s.
        event["time"] = 100.0 + 2 * n + 3600 * (n >= 9) + 7 * (event["event"] == "StageFinished")
    path.write_text("".join(json.dumps(event) + "\n" for event in records))
    assert read_history(tmp_path).clock_s == {"32k": 7 * 2 + 5 * 2 + 9.0}
    page = write_report(tmp_path, None, tmp_path / "report.html").read_text()
    assert "<td>5 s</td><td>33 s</td><td>done</td>" in page, "ten steps of 0.5 s, and what the clock says"
    del records[2]["time"]
    path.write_text("".join(json.dumps(event) + "\n" for event in records))
    with pytest.raises(DataError, match="StepDone without its time"):
        read_history(tmp_path)


def test_the_page_names_dropped_conversations(tmp_path: Path) -> None:
    write_run(tmp_path)
    mix = {
        "read": 900, "conversations": 15, "rows": 12, "tokens": 800, "trained_tokens": 300, "padding_share": 0.25,
        "unwanted": 0, "unused_keys": {"<id>": 900}, "dropped_over_length": 885, "truncated": 0, "dropped_untrained": 0,
        "core_share": math.nan, "core_target": 0.7, "without_domain": 900, "reflections": 0, "dropped_held_out": 0,
    }  # fmt: skip
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines(dataclasses.replace(stage("sft"), mix=mix))
    lines.close()
    page = write_report(tmp_path, None, tmp_path / "report.html").read_text()
    assert "15 of 900 conversations in 12 rows: 800 tokens, 300 of them trained, 25.0% of the rows is padding" in page
    assert "keys that nothing reads: &lt;id&gt; (900)" in page
    assert "<b>885 of 900 conversations dropped: longer than a row (sft.over_length is drop)</b>" in page
    more = {
        "files": [{"file": "<a>.json", "dialect": "alpaca", "rows": 900}],
        "bad_rows": {"not JSON": 3},
        "samples": 1000,
    }
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines(dataclasses.replace(stage("sft"), mix=mix | more))
    lines.close()
    page = write_report(tmp_path, None, tmp_path / "report.html").read_text()
    assert "&lt;a&gt;.json: alpaca, 900 rows" in page
    assert "1,000 samples of 900 conversations (sft.earlier_reasoning is split)" in page
    assert "15 of 1,000 conversations in 12 rows" in page
    assert "<b>3 of 900 rows left out (sft.bad_rows is skip): not JSON</b>" in page


def test_the_page_shows_the_selection_and_the_held_out_loss(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = {"conversations": 50, "reflective": 29, "trained_tokens": 4000, "matches": {"wait": 38, "however": 32}}
    after = {"conversations": 20, "reflective": 20, "trained_tokens": 1000, "matches": {"wait": 30, "however": 20}}
    mix = {
        "files": [{"file": "a.json", "dialect": "openai", "rows": 50, "weight": 0.5, "drawn": 20}], "read": 50, "samples": 50,
        "bad_rows": {}, "conversations": 20, "rows": 2, "tokens": 1500, "trained_tokens": 1000, "padding_share": 0.25,
        "unwanted": 0, "unused_keys": {}, "dropped_over_length": 0, "truncated": 0, "dropped_untrained": 0, "core_share": 0.7,
        "core_target": 0.6, "without_domain": 2, "domains": [], "before_selection": before, "after_selection": after,
        "dropped_held_out": 0, "held_out": 3, "left_out": 21,
    }  # fmt: skip
    loss = [DomainLoss(domain="math", conversations=2, trained_tokens=40, loss=1.25)]
    loss.append(DomainLoss(domain="", conversations=1, trained_tokens=9, loss=2.5))
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines(dataclasses.replace(stage("sft"), mix=mix))
    lines(
        HeldOutMeasured(
            stage="sft", checkpoint="c", checkpoint_sha256="s", global_step=1, loss=1.4796, domains=loss, seconds=1.0
        )
    )
    lines.close()
    page = write_report(tmp_path, None, tmp_path / "report.html").read_text()
    assert "a.json: openai, 50 rows, 20 samples in a pass (weight 0.5)" in page
    assert "patterns of reflection: 70 in 58.0% of 50 conversations, 17.50 in 1,000 trained tokens" in page
    assert "after selection: 50 in 100.0% of 20 conversations, 50.00 in 1,000 trained tokens" in page
    assert "math and code: 70.0% of the conversations that name a domain, MiniMax-M1 has 60%; 2 name none" in page
    assert "3 held out, to be measured on at the end" in page
    assert "21 left out: too few patterns of reflection" in page
    assert "held-out conversations: loss 1.4796 over 3 conversations; math: loss 1.2500 over 2 conversations" in page
    assert "no domain named: loss 2.5000 over 1 conversations, 9 trained tokens" in page


def evaluated(name: str, lengths: list[int], *, positions: bool = True) -> StageEvaluated:
    """Recall falls with length and rises with depth."""
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    recall = [[max(0.0, min(1.0, 0.2 + d - 0.15 * n)) for d in depths] for n in range(len(lengths))]
    first = [1] + [16 << n for n in range(9)]
    return StageEvaluated(
        stage=name, checkpoint="step_00000010", checkpoint_sha256="a" * 64, global_step=10, seq_len=8192,
        recall=sum(map(sum, recall)) / (5 * len(lengths)), seconds=1.5,
        skipped=[] if positions else ["loss by position: the prepared data holds no documents out"],
        needles=NeedleMap(
            lengths=lengths, depths=depths, samples=4, haystack="held-out text", recall=recall, exact=recall,
            loss=[[7.0 - 5 * r for r in row] for row in recall], control_recall=[0.01] * len(lengths),
            control_loss=[7.5] * len(lengths),
        ),
        positions=PositionLoss(
            first=first, loss=[5.0 - 0.2 * n for n in range(10)], near_loss=[max(3.8, 5.0 - 0.2 * n) for n in range(10)],
            tokens=[100] * 10, documents=[8] * 10, near_tokens=256,
        ) if positions else None,
    )  # fmt: skip


def test_long_range_on_the_page_and_on_a_terminal(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = re.sub(r"<script.*?</script>", "", write_report(tmp_path, None, tmp_path / "r.html").read_text(), flags=re.S)
    assert "No stage was evaluated" in text
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines(evaluated("32k", [64, 128], positions=False))
    lines(evaluated("128k", [64, 128, 256, 512]))
    lines(GateForced(stage="128k", before="32k", recall=0.25, gate=0.5))
    lines.close()
    page = write_report(tmp_path, None, tmp_path / "r.html").read_text()
    for part in ("32k: not measured: loss by position", "stage 128k was forced: recall of stage 32k is 25.0%"):
        assert part in page
    history = read_history(tmp_path)
    maps = needle_maps(history).data
    assert [list(m.x) for m in maps] == [["64", "128"], ["64", "128", "256", "512"]]
    assert [round(z) for z in maps[1].z[2]] == [70, 55, 40, 25], "a row is a depth"
    whole, near = position_losses(history).data
    assert (list(whole.y)[-1], list(near.y)[-1]) == (pytest.approx(3.2), pytest.approx(3.8))
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation_view(evaluated("128k", [64, 128, 256, 512])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"50 % │ +70 +│ +55 +│ +40 +│ +25 +│", shown), shown
    assert re.search(r"1,024–2,047 │ 3.600 │ +3.800 │ \+0.200 │ +8", shown), shown
    assert "with nothing" in shown


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has reported nothing yet"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"event": "RunSt\n{"event": "StepDone"}\n')
    with pytest.raises(DataError) as caught:
        read_history(tmp_path)
    assert caught.value.where.endswith("metrics.jsonl:1")


def append(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.writelines(orjson.dumps({"time": 0.0} | event) + b"\n" for event in events)


def test_every_event_worth_a_line_has_one(tmp_path: Path) -> None:
    write_run(tmp_path)
    kinds = [kind for kind in get_args(Event) if kind.__name__ in LISTED]
    assert len(kinds) == len(LISTED)
    append(tmp_path, *(record(kind) for kind in kinds), record(RunStopped, reason="out of time", exit_code=75))
    for seconds in ({"train": 15.0, "save": 2.0}, {"train": 5.0, "<odd>": 8.0}):
        append(tmp_path, record(RunStopped, wall_s=seconds))
    page = write_report(tmp_path, None, tmp_path / "r.html").read_text()
    assert "their end: 30 s: 67% in steps, 27% &lt;odd&gt;, 7% saving." in page
    events = page.split("<h2>Events</h2>")[1].count("<li>")
    assert events == len(LISTED) + 2, "one for the stage that was continued"
    assert "events could not be written for a while" in page


def test_steps_that_were_not_finite_or_of_another_model_are_gaps(tmp_path: Path) -> None:
    write_run(tmp_path)
    append(
        tmp_path,
        dataclasses.asdict(step("32k", 10, loss=math.nan)) | {"event": "StepDone", "grad_norm": math.nan},
        dataclasses.asdict(step("32k", 11))
        | {"event": "StepDone", "layer_grad_norms": [0.1, math.nan], "expert_load": [[0.75, 0.25], [0.5]]},
        dataclasses.asdict(step("32k", 12)) | {"event": "StepDone", "expert_load": None},
    )
    write_report(tmp_path, None, tmp_path / "r.html")
    history = read_history(tmp_path)
    smoothed = over_tokens(history, "loss", "", smooth=True).data[1].y
    assert [n for n, value in enumerate(smoothed) if math.isnan(value)] == [10]
    rows = layer_norms(history).data[0].z
    assert [n for n, value in enumerate(rows[0]) if math.isnan(value)] == []
    assert [n for n, value in enumerate(rows[1]) if math.isnan(value)] == [11]
    assert [n for n, value in enumerate(rows[7]) if math.isnan(value)] == [11]
    assert [list(row) for row in expert_load(history).data[0].z] == [[1.5, 0.5], [0.5]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"mix": {"length_classes": {}}}, "domains is missing"),
        ({"mix": MIX | {"core": {"wanted": "\x1b", "reached": 1.0}}}, r"core.wanted is '\\x1b', which is not float"),
        ({"mix": MIX | {"epochs": [{"source": "web", "bucket": []}]}}, r"epochs\[0\].epochs is missing"),
        ({"mix": {"read": 1}}, "conversations is missing"),
        ({"slopes_new": [[0.5, 0.0]]}, "a decay rate that is not above 0"),
        ({"slopes_new": [[math.nan]]}, "a decay rate that is not above 0"),
    ],
    ids=range(6),
)
def test_a_stage_that_cannot_be_drawn_is_refused(damage: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    append(tmp_path, dataclasses.asdict(stage("32k")) | {"event": "StageStarted"} | damage)
    with pytest.raises(DataError, match=f"StageStarted of stage 32k is damaged: .*{message}") as caught:
        write_report(tmp_path, None, tmp_path / "r.html")
    assert caught.value.where == str(tmp_path / "metrics.jsonl")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("kind", "what"), [("RunStarted", "RunStarted"), ("StageStarted", "StageStarted of stage 32k")]
)
def test_steps_without_their_beginning_are_refused(kind: str, what: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if f'"{kind}"' not in line))
    with pytest.raises(DataError, match=f"there are steps, and no {what}"):
        read_history(tmp_path)


def test_what_the_guard_did_is_in_the_list_of_events(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = JsonLines(tmp_path / "metrics.jsonl")
    common: dict[str, Any] = {"stage": "32k", "step": 7, "global_step": 7, "sample_ids": list(range(28, 38))}
    numbers: dict[str, Any] = {
        "series": "grad_norm", "value": 99.2, "median": 0.5, "z": 42.0, "loss": 5.0, "grad_norm": 99.2, "layer_grad_norms": [],
        "ramp_progress": 0.5, "bad_ranks": [], "skipped_in_budget": 1,
    }  # fmt: skip
    lines(GuardNoticed(**common, **numbers, action="skip", ramp="reverse", reason="spike"))
    for _ in range(3):
        lines(GuardNoticed(**common, **numbers, action="apply", ramp="hold", reason="outside of its band"))
    lines(StepRepeated(**common, verdict="transient", bad_ranks=[1]))
    lines.close()
    page = write_report(tmp_path, None, tmp_path / "r.html").read_text()
    for part in (
        "32k step 7: spike in grad_norm, 99.2, median 0.5: skip, decay ramp reverse; "
        "samples 28, 29, 30, 31, 32, 33, 34, "
        "35 and 2 more",
        "32k step 7 was not finite; repeated: transient",
        "the guard held the decay ramp of stage 32k in 3 steps",
    ):
        assert part in page
