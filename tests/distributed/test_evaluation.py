"""What is measured after a stage: right on hand-made models, the same in every layout, and harmless to the training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_on_ranks
from support.tiny_run import make_run

from m1_data.sampling.needles import PAIR_TOKENS
from m1_data.storage.manifest import load_manifest
from m1_stages.checkpoint import CheckpointStore
from m1_stages.config.load import load_config
from m1cli.commands.stages import stage_chain
from m1cli.report.html import write_report

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "EP2": {"expert": 2},
    "DP2": {},
    "DP2 overlapped": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}


@cache
def measured(world: int, layout: str, **more: Any) -> list[dict[str, Any]]:
    return run_on_ranks(world, "distributed.evaluate_worker:layout", {"parallel": LAYOUTS.get(layout, {}), **more})


def numbers(result: dict[str, Any]) -> list[float]:
    parts = (result["needles"], result["positions"])
    text = json.dumps([[v for k, v in part.items() if k != "haystack"] for part in parts])
    return [float(x) for x in text.replace("[", " ").replace("]", " ").replace(",", " ").split()]


def worst(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(abs(x - y) for x, y in zip(numbers(a), numbers(b), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_what_one_process_does(layout: str) -> None:
    alone, ranks = measured(1, "")[0], measured(2, layout)
    assert 0 < sum(map(sum, alone["needles"]["recall"])) < 6, "all or nothing would say little"
    assert alone["needles"]["loss"][0][0] != alone["needles"]["loss"][0][1]
    for rank in ranks:
        assert worst(rank, alone) < 2e-6
        assert rank == ranks[0], "the ranks disagree"


@pytest.mark.parametrize("layout", ["", *LAYOUTS])
def test_weights_gradients_moments_statistics_and_random_state_are_left_alone(layout: str) -> None:
    for rank in measured(2 if layout else 1, layout):
        assert rank["unchanged"]
        assert rank["training"]
        assert rank["checks"] > 3


def test_rows_at_once_do_not_matter() -> None:
    assert worst(measured(1, "", tokens_at_once=64)[0], measured(1, "")[0]) < 2e-6


@pytest.mark.parametrize(
    ("layout", "mutation"), [("CP2", "marks of contiguous shards"), ("CP2", "not summed over ranks"),
                             ("DP2", "not summed over ranks")]
)  # fmt: skip
def test_parity_fails_when_the_code_is_wrong(layout: str, mutation: str) -> None:
    wrong = measured(2, layout, mutation=mutation)
    assert max(worst(rank, measured(1, "")[0]) for rank in wrong) > 1e-2


def oracle(**job: Any) -> dict[str, Any]:
    result: dict[str, Any] = run_on_ranks(1, "distributed.evaluate_worker:oracle", job)[0]
    return result


def test_a_model_that_copies_recalls_everything_and_guesses_nothing() -> None:
    result = oracle(kind="copy", sight=1000, lengths=[64, 96, 256], depths=[0.0, 0.3, 1.0])
    assert result["recall"] == result["exact"] == [[1.0] * 3] * 3
    assert max(map(max, result["loss"])) < 1e-6
    assert result["control_recall"] == [0.0] * 3
    assert min(result["control_loss"]) > 5.0


def test_a_short_sighted_model_recalls_what_is_near() -> None:
    """Which depths of which lengths are within sight follows from where needles lie."""
    lengths, depths, sight = [64, 128, 256], [0.0, 0.25, 0.5, 0.75, 1.0], 100
    result = oracle(kind="copy", sight=sight, lengths=lengths, depths=depths)
    near = [
        [length - PAIR_TOKENS - round(depth * (length - 2 * PAIR_TOKENS)) <= sight for depth in depths]
        for length in lengths
    ]
    assert [row.count(True) for row in near] == [5, 4, 2]
    assert result["recall"] == [[float(seen) for seen in row] for row in near]
    blind = oracle(kind="copy", sight=PAIR_TOKENS - 1, lengths=[64], depths=[1.0])
    assert blind["recall"] == [[0.0]]


def test_loss_by_position_on_a_model_that_knows_tokens_from_a_position_on() -> None:
    result = oracle(kind="position", sight=63, seq_len=256, documents=[400, 257, 256, 100])
    uniform = math.log(250)
    assert result["first"] == [1, 16, 32, 64, 128]
    assert result["loss"] == pytest.approx([uniform] * 3 + [0.0] * 2, abs=1e-5)
    assert result["near_tokens"] == 16
    assert result["near_loss"] == pytest.approx([uniform] * 5, abs=1e-5), "pieces of 16 never get there"
    assert result["tokens"] == [60, 64, 128, 3 * 64 + 36, 3 * 128]
    assert result["documents"] == [4, 4, 4, 4, 3]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluated"))


SMALL = ["evaluate.enabled=true", "evaluate.samples=1", "evaluate.depths=[0.0, 1.0]", "stages.32k.tokens=3072",
         "stages.128k.tokens=3072"]  # fmt: skip


def pretrained(config: Path, run_dir: Path, stages: list[str], *more: str, **job: Any) -> dict[str, Any]:
    overrides = [*SMALL, f"run.dir={run_dir}", *more]
    result: dict[str, Any] = run_on_ranks(
        1, "distributed.evaluate_worker:pretrained", {"config": str(config), "set": overrides, "stages": stages, **job}
    )[0]
    return result


@pytest.fixture(scope="module")
def evaluated(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    run_dir = tmp_path_factory.mktemp("run") / "run"
    return pretrained(prepared, run_dir, ["32k", "128k"]), run_dir


def test_a_run_with_evaluation_takes_the_same_steps_bit_for_bit(
    prepared: Path, evaluated: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    without = pretrained(prepared, tmp_path / "run", ["32k", "128k"], "evaluate.enabled=false")
    assert (without["exit"], without["events"]) == (0, [])
    assert len(without["steps"]) == 6
    assert evaluated[0]["steps"] == without["steps"]


def test_results_are_events_and_files_about_the_final_checkpoints(evaluated: tuple[dict[str, Any], Path]) -> None:
    result, run_dir = evaluated
    assert [event["stage"] for event in result["events"]] == ["32k", "128k"]
    finals = {c.meta.stage: c for c in CheckpointStore(run_dir / "checkpoints").committed() if c.meta.stage_final}
    for event in result["events"]:
        written = json.loads((run_dir / "evaluation" / f"{event['stage']}.json").read_text())
        assert written == {key: value for key, value in event.items() if key != "event"}
        final = finals[event["stage"]]
        assert (event["checkpoint"], event["checkpoint_sha256"]) == (final.path.name, final.sha256)
    long = result["events"][1]
    assert long["needles"]["lengths"] == [64, 128, 256, 512]
    assert (long["needles"]["haystack"], long["skipped"]) == ("held-out text", [])
    assert long["positions"]["first"][0] == 1
    assert all(0 < loss < 12 for loss in (*long["positions"]["loss"], *long["needles"]["control_loss"]))


def test_a_stop_in_an_evaluation_saves_and_the_next_start_evaluates(prepared: Path, tmp_path: Path) -> None:
    stopped = pretrained(prepared, tmp_path / "run", ["32k"], stop_in_evaluation=True)
    assert stopped["exit"] == 75
    assert "while stage 32k was evaluated; its final checkpoint is saved" in stopped["error"]
    assert not (tmp_path / "run" / "evaluation").exists()
    final = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert final is not None
    assert final.meta.stage_final
    again = pretrained(prepared, tmp_path / "run", ["32k"])
    assert (again["exit"], again["steps"], len(again["events"])) == (0, [], 1)
    assert again["events"][0]["checkpoint_sha256"] == final.sha256
    third = pretrained(prepared, tmp_path / "run", ["32k"])
    assert (third["exit"], third["steps"], third["events"]) == (0, [], []), "once is enough"


def test_the_gate_refuses_and_a_forced_start_is_recorded(prepared: Path, tmp_path: Path) -> None:
    run_dir, gate = tmp_path / "run", "evaluate.gate=0.9"
    refused = pretrained(prepared, run_dir, ["32k", "128k"], gate)
    assert refused["exit"] == 6
    for part in ("stage 128k may not start", "recalls 0.0% of the needles", "asks for 90.0%", "--stage 128k --force"):
        assert part in refused["error"]
    assert len(refused["steps"]) == 3
    lower = pretrained(prepared, run_dir, ["128k"], "evaluate.gate=0.0", "stages.128k.tokens=1024")
    assert (lower["exit"], [e["event"] for e in lower["events"]]) == (0, ["StageEvaluated"])
    forced = pretrained(prepared, run_dir, ["256k", "512k"], gate, "stages.256k.tokens=1024",
                        "stages.512k.tokens=2048", force=True)  # fmt: skip
    assert forced["exit"] == 0
    record = [
        {"stage": stage, "before": before, "recall": 0.0, "gate": 0.9}
        for stage, before in (("256k", "128k"), ("512k", "256k"))
    ]
    events = [{k: v for k, v in e.items() if k != "event"} for e in forced["events"] if e["event"] == "GateForced"]
    assert events == record
    extras = {c.meta.stage: c.meta.extra["forced_gates"] for c in CheckpointStore(run_dir / "checkpoints").committed()}
    assert extras == {"32k": [], "128k": [], "256k": record[:1], "512k": record}
    (run_dir / "evaluation" / "512k.json").unlink()
    unknown = pretrained(prepared, run_dir, ["1m"], gate)
    assert unknown["exit"] == 6
    assert "that of stage 512k is not known" in unknown["error"]
    assert "m1 evaluate --stage 512k" in unknown["error"]


def test_without_held_out_documents_only_that_part_is_skipped(prepared: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(load_manifest(prepared.parent / "data"), held_out=())
    (tmp_path / "data").mkdir()
    for name in ("shards", "tokenizer"):
        (tmp_path / "data" / name).symlink_to(prepared.parent / "data" / name)
    (tmp_path / "data" / "manifest.json").write_text(manifest.to_json())
    result = pretrained(prepared, tmp_path / "run", ["32k"], f"data.out={tmp_path}/data", "stages.32k.tokens=1024")
    (event,) = result["events"]
    assert event["needles"]["haystack"] == "random token ids"
    assert event["positions"] is None
    assert event["skipped"][0].startswith("loss by position: the prepared data holds no documents out")


def test_the_command_measures_again_and_the_chain_shows_it(
    prepared: Path, evaluated: tuple[dict[str, Any], Path]
) -> None:
    run_dir = evaluated[1]
    overrides = [*SMALL, f"run.dir={run_dir}"]
    written = run_dir / "evaluation" / "128k.json"
    before = json.loads(written.read_text())
    written.unlink()
    options = [part for text in overrides for part in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "m1cli", "evaluate", "--stage", "128k", "--config", str(prepared), *options],
        capture_output=True, text=True, timeout=200, env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("stage 128k: needle recall %", "nothing hidden", "end 100 %", "loss by position in held-out"):
        assert part in done.stdout, done.stdout
    after = json.loads(written.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}, "the same checkpoint gives the same numbers"
    chain = stage_chain(load_config(prepared, overrides))
    assert [stage["state"] for stage in chain] == ["done", "done", "to do", "to do", "to do"]
    finals = [c.sha256 for c in CheckpointStore(run_dir / "checkpoints").committed() if c.meta.stage_final]
    assert [stage["checkpoint_sha256"] for stage in chain] == [*finals[::-1], None, None, None]
    assert [stage["starts_from_sha256"] for stage in chain] == [None, *finals[::-1], None, None]
    assert [stage["needle_recall"] for stage in chain[:3]] == [0.0, after["recall"], None]
    page = write_report(run_dir, None, run_dir / "report.html").read_text()
    assert "Learning at long range" in page
    assert "Needles found, by length and depth" in page
