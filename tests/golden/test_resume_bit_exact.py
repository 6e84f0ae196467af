"""A run that is cut and continued is the run that was never cut, bit for bit (one process, CPU)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretraining import events_of
from support.ranks import run_on_ranks
from support.tiny_checkpoint import tensors_of
from support.tiny_run import make_run, prepare_data

from m1_stages.checkpoint.manifest import read_manifest
from m1_stages.config import STAGE_NAMES


def train(
    config: Path,
    stages: str | list[str],
    out: Path,
    stop_at: int = -1,
    settings: Sequence[str] = (),
    loads: int | None = None,
    **more: Any,
) -> int:
    job = {
        "config": str(config),
        "stages": stages,
        "events": str(out),
        "stop_at": stop_at,
        "set": list(settings),
    } | more
    (ended,) = run_on_ranks(1, "support.pretraining:pretrained", job, fresh=True, timeout_s=200)
    assert ended["exit"] in (0, 75) or settings, ended["error"]
    assert loads in (None, ended["loaded"])
    return int(ended["exit"])


def steps(path: Path) -> list[Any]:
    """What each step was, to the last bit."""
    keys = ("stage", "global_step", "loss", "grad_norm", "lr", "aux_loss", "sample_ids")
    return [[event[key] for key in keys] for event in events_of(path, "StepDone")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make_run(folder)
    return folder


def copy_run(prepared: Path, target: Path) -> Path:
    shutil.copytree(prepared, target)
    return target / "m1.toml"


@pytest.fixture(scope="module")
def uncut(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    config = copy_run(prepared, tmp_path_factory.mktemp("uncut") / "run")
    out = config.parent / "steps.jsonl"
    beside = ["run.async_save=on"]
    assert train(config, "all", out, settings=beside, loads=0, slow_finals="1m") == 0, "stages go on from memory"
    return steps(out), config.parent / "run" / "checkpoints"


# Steps 0-5 are stage 32k, 6-11 128k (its decay ramp moves during 6-8), 12-15 256k, 16-17 512k, 18-19 1m.
@pytest.mark.parametrize("cuts", [(2, 8), (5,), (13, 16)], ids=["twice, in a ramp", "at a stage's end", "late"])
def test_cut_and_continued(
    prepared: Path, uncut: tuple[list[Any], Path], tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    expected, checkpoints = uncut
    config = copy_run(prepared, tmp_path / "run")
    out = config.parent / "steps.jsonl"
    for cut in cuts:
        assert train(config, "all", out, cut) == 75
    assert train(config, "all", out) == 0
    assert steps(out) == expected
    assert expected[-1][1] == 19
    later = {event["stage"]: event["later"] for event in events_of(out, "StageStarted")}
    assert {stage: x["stages"] if x else [] for stage, x in later.items()} == {
        stage: list(STAGE_NAMES[n + 1 :]) for n, stage in enumerate(STAGE_NAMES)
    }
    # Two steps of 1m have twice the tokens of those of 512k, and attend to a little more.
    assert 4.0 < later["512k"]["cost_in_steps"] < 4.6
    final = sorted((config.parent / "run" / "checkpoints").glob("step_*"))[-1]
    mine, theirs = tensors_of(final), tensors_of(checkpoints / final.name)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 100, "weights and both Adam moments"
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert read_manifest(final).meta.decay == read_manifest(checkpoints / final.name).meta.decay


def test_a_stage_is_finished_while_the_next_one_trains(uncut: tuple[list[Any], Path]) -> None:
    """Its final checkpoint is committed after the first step of the next stage, and only then the stage is said to be done."""
    names = ("StepDone", "CheckpointSaved", "StageFinished")
    events = events_of(uncut[1].parent.parent / "steps.jsonl", *names)
    order = [(e["event"], e["stage"], e.get("step", -1)) for e in events if e.get("stage_final", True)]
    for stage, following, num_steps in (("32k", "128k", 6), ("512k", "1m", 2)):
        at = [
            order.index(what)
            for what in (
                ("StepDone", stage, num_steps - 1),
                ("StepDone", following, 0),
                ("CheckpointSaved", stage, num_steps),
                ("StageFinished", stage, -1),
            )
        ]
        assert at == sorted(at), order
    finished = [event for event in events if event["event"] == "StageFinished"]
    assert [event["stage"] for event in finished] == list(STAGE_NAMES)
    assert [Path(event["checkpoint"]).name for event in finished] == [f"step_{n:08d}" for n in (6, 12, 16, 18, 20)]


def test_distributed_optimizer_continues_exactly(prepared: Path, tmp_path: Path) -> None:
    """Its step counters are one shared tensor after a load unless somebody unshares them: a drift, not an error."""

    def run(name: str) -> tuple[Path, Path]:
        config = copy_run(prepared, tmp_path / name)
        config.write_text(config.read_text() + "[parallel]\ndistributed_optimizer = true\n")
        return config, config.parent / "steps.jsonl"

    config, uncut = run("uncut")
    assert train(config, ["32k", "128k"], uncut, loads=0) == 0
    config, cut = run("cut")
    for stage, at, loads in (("32k", 1, (0, 1)), ("128k", 8, (1, 1))):
        assert train(config, stage, cut, at, loads=loads[0]) == 75
        assert train(config, stage, cut, loads=loads[1]) == 0
    assert len(steps(uncut)) == 12
    assert steps(cut) == steps(uncut)
    first, second = (tensors_of(path.parent / "run" / "checkpoints" / "step_00000012") for path in (cut, uncut))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_stage_by_stage_equals_all_at_once(prepared: Path, uncut: tuple[list[Any], Path], tmp_path: Path) -> None:
    config = copy_run(prepared, tmp_path / "run")
    out = config.parent / "steps.jsonl"
    for stage in ("32k", "128k"):
        assert train(config, stage, out) == 0
    assert steps(out) == [step for step in uncut[0] if step[0] in ("32k", "128k")]
    mine, other = (tensors_of(path / "step_00000012") for path in (config.parent / "run" / "checkpoints", uncut[1]))
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_finished_stages_are_left_alone(prepared: Path, uncut: tuple[list[Any], Path], tmp_path: Path) -> None:
    config = copy_run(prepared, tmp_path / "run")
    shutil.copytree(uncut[1], config.parent / "run" / "checkpoints")
    out = config.parent / "steps.jsonl"
    assert train(config, "all", out) == 0
    assert steps(out) == []


def test_weights_of_another_tokenizer_and_other_data_are_refused_by_name(
    prepared: Path, uncut: tuple[list[Any], Path], tmp_path: Path
) -> None:
    config = copy_run(prepared, tmp_path / "run")
    checkpoints = config.parent / "run" / "checkpoints"
    shutil.copytree(uncut[1] / "step_00000006", checkpoints / "step_00000006")
    job = {"config": str(config), "events": str(config.parent / "events.jsonl")}

    def refused(code: int, stages: str, **more: Any) -> str:
        (ended,) = run_on_ranks(1, "support.pretraining:pretrained", job | {"stages": stages} | more, timeout_s=200)
        assert ended["exit"] == code, ended["error"]
        return str(ended["error"])

    refused(75, "128k", stop_at=7)
    text = config.read_text()
    config.write_text(text.replace("[tokenizer]", "[tokenizer]\ntrain_bytes = 9000"))
    assert prepare_data(config).vocab_size == 400, "another tokenizer of the same size"
    error = refused(2, "128k")
    assert "the checkpoint was trained with another tokenizer" in error
    assert "data/tokenizer/tokenizer.json" in error
    config.write_text(text.replace("[data]", "[data]\nheld_out = 0"))
    prepare_data(config)
    assert "the prepared data changed since stage 128k was interrupted at step 3" in refused(4, "128k")


@pytest.fixture(scope="module")
def interrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after the first four of the six steps of stage 32k."""
    config = copy_run(prepared, tmp_path_factory.mktemp("interrupted") / "run")
    assert train(config, "32k", config.parent / "steps.jsonl", 2) == 75
    return config.parent


@pytest.mark.parametrize("tokens", [512, 2048], ids=["halved", "doubled"])
def test_another_batch_in_mid_stage_is_refused_and_loses_nothing(
    interrupted: Path, uncut: tuple[list[Any], Path], tmp_path: Path, tokens: int
) -> None:
    config = copy_run(interrupted, tmp_path / "run")
    out, other = config.parent / "steps.jsonl", f"stages.32k.global_batch_tokens={tokens}"
    before = sorted((config.parent / "run" / "checkpoints").rglob("*"))
    assert train(config, "32k", out, settings=[other]) == 2
    assert sorted((config.parent / "run" / "checkpoints").rglob("*")) == before
    assert train(config, "32k", out) == 0
    assert steps(out) == [step for step in uncut[0] if step[0] == "32k"]


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_other_micro_batches_train_the_same_rows(
    interrupted: Path, uncut: tuple[list[Any], Path], tmp_path: Path, rows: int
) -> None:
    config = copy_run(interrupted, tmp_path / "run")
    out = config.parent / "steps.jsonl"
    assert train(config, "32k", out, settings=[f"stages.32k.micro_batch_rows={rows}"]) == 0
    expected = [step for step in uncut[0] if step[0] == "32k"]
    assert [step[-1] for step in steps(out)] == [step[-1] for step in expected]
    assert [step[2] for step in steps(out)] == pytest.approx([step[2] for step in expected], rel=1e-6)
    assert events_of(out, "SettingsChanged") == []


def test_changed_rates_and_optimizer_settings_are_applied_and_said(
    interrupted: Path, uncut: tuple[list[Any], Path], tmp_path: Path
) -> None:
    expected = [step for step in uncut[0] if step[0] == "32k"]
    made = {}
    for key, value in (
        ("optim.weight_decay", 5.0),
        ("optim.beta1", 0.5),
        ("optim.eps", 0.1),
        ("stages.32k.lr_peak", 0.02),
    ):
        config = copy_run(interrupted, tmp_path / key)
        out = config.parent / "steps.jsonl"
        assert train(config, "32k", out, settings=[f"{key}={value}"]) == 0
        (event,) = events_of(out, "SettingsChanged")
        assert (event["stage"], event["step"], event["note"]) == ("32k", 4, "")
        assert [(c["key"], c["new"]) for c in event["changes"]] == [(key, value)]
        made[key] = steps(out)
        assert made[key][:4] == expected[:4]
        assert made[key][4][2] == expected[4][2], "the first loss is that of the saved weights"
        assert made[key][5][2] != expected[5][2], f"{key} has no effect"
    assert made["stages.32k.lr_peak"][4][4] > expected[4][4]
