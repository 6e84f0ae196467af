"""Named fine-tunings in the configuration: their values, their order, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.tiny_checkpoint import meta
from typer.testing import CliRunner

from m1_stages.checkpoint import Committed
from m1_stages.checkpoint.directories import left_behind, replaced, step_directories
from m1_stages.checkpoint.imported import starting_point
from m1_stages.config.load import load_config
from m1_stages.config.schema import STAGE_NAMES, Resolved
from m1_stages.config.sft_runs import configured_runs, for_run, for_stage, known_stages, stage_of_base
from m1_stages.config.when_changed import recorded_values
from m1_stages.curriculum import plan_sft, train_command
from m1_stages.errors import ConfigError
from m1_stages.plan.stage_workload import stage_workloads
from m1cli.app import app

SECTION = """[sft]
base_stage = "32k"
data = ["a.jsonl", "b.jsonl"]
epochs = 3
[sft.weights]
"a.jsonl" = 2.0
"b.jsonl" = 0.5
"""


def load(folder: Path, *runs: str, overrides: tuple[str, ...] = ()) -> Resolved:
    path = folder / "m1.toml"
    path.write_text('preset = "tiny"\n' + SECTION + "".join(f"[[sft.runs]]\n{run}\n" for run in runs))
    return load_config(path, overrides)


LAST = 'name = "last"\nbase_stage = "first"\ndata = ["b.jsonl"]\nlr_peak = 5e-3'
FIRST = 'name = "first"\nepochs = 1'


def test_a_run_has_its_own_values_and_the_sections(tmp_path: Path) -> None:
    resolved = load(tmp_path, LAST, FIRST)
    last, first, plain = (for_run(resolved, name).config.sft for name in ("last", "first", "sft"))
    assert (last.base_stage, last.data, last.epochs, last.lr_peak) == ("first", ("b.jsonl",), 3.0, 5e-3)
    assert last.weights == {"b.jsonl": 0.5}, "the weight of a file that the run does not have is not its own"
    assert (first.base_stage, first.data, first.epochs, first.lr_peak) == ("32k", ("a.jsonl", "b.jsonl"), 1.0, 1e-3)
    assert first.weights == {"a.jsonl": 2.0, "b.jsonl": 0.5}
    assert plain == dataclasses.replace(resolved.config.sft, runs=())
    assert for_run(resolved, "last").origins["sft.lr_peak"] == f"{tmp_path / 'm1.toml'}:13"
    assert recorded_values(for_run(resolved, "last"))["sft.lr_peak"] == 5e-3
    assert for_stage(resolved, "sft-first").config.sft == first
    assert for_stage(resolved, "sft-gone") is resolved is for_stage(resolved, "32k")


def test_set_wins_over_a_run_as_the_later_layer(tmp_path: Path) -> None:
    resolved = load(tmp_path, LAST, FIRST, overrides=("sft.lr_peak=7e-3",))
    assert [for_run(resolved, name).config.sft.lr_peak for name in ("last", "first", "sft")] == [7e-3] * 3


def test_runs_are_done_after_what_they_start_from(tmp_path: Path) -> None:
    other = 'name = "other"\nbase_stage = "sft"'
    assert configured_runs(load(tmp_path, LAST, other, FIRST).config.sft) == ["first", "last", "other"]
    assert configured_runs(load(tmp_path).config.sft) == ["sft"]
    assert known_stages(load(tmp_path, LAST, FIRST).config.sft) == (*STAGE_NAMES, "sft", "sft-last", "sft-first")
    assert [stage_of_base(base) for base in ("32k", "import", "sft", "first")] == ["32k", "import", "sft", "sft-first"]
    assert [train_command(s) for s in ("sft", "sft-first")] == ["m1 sft", "m1 sft --name first"]


def test_a_plan_is_the_runs_and_keeps_the_base_of_another_fine_tuning(tmp_path: Path) -> None:
    resolved = load(tmp_path, LAST, FIRST)
    slopes = [[0.5, 0.25]] * resolved.config.model.num_layers
    plan = plan_sft(for_run(resolved, "last"), 1000, (slopes, 7e6))
    assert (plan.stage, plan.starts_from, plan.title) == ("sft-last", "sft-first", "fine-tuning last")
    assert (plan.rope_base, plan.slopes_old, plan.slopes_new) == (7e6, slopes, slopes)
    assert (plan.lr.peak, plan.config_section) == (5e-3, "sft")
    imported = Committed(path=tmp_path, meta=meta(0, stage="import", final=True), files={}, sha256="")
    assert starting_point(plan, [imported]) == plan, "a missing run is not replaced by the import"
    plain = plan_sft(for_run(resolved, "sft"), 1000)
    assert starting_point(plain, [imported]).starts_from == "import"
    assert (plain.stage, plain.starts_from, plain.title) == ("sft", "32k", "fine-tuning")
    assert plain.rope_base == resolved.config.stages["32k"].rope_base
    workloads = {w.stage: w for w in stage_workloads(resolved.config)}
    assert list(workloads) == [*STAGE_NAMES, "sft-last", "sft-first"]


REFUSED = [
    ([FIRST, FIRST], "two runs are named 'first'", "sft.runs.1.name"),
    (['name = "Math"'], "'Math' cannot be the name of a run", "sft.runs.0.name"),
    (['name = "../up"'], "'../up' cannot be the name of a run", "sft.runs.0.name"),
    (['name = "32k"'], "'32k' stands for something else already", "sft.runs.0.name"),
    (['name = "import"'], "'import' stands for something else already", "sft.runs.0.name"),
    (['name = "a"\nbase_stage = "b"'], "run 'a' starts from 'b', which is neither a stage nor a run", "sft.runs.0.base_stage"),
    (['name = "a"\nbase_stage = "a"'], "runs start from each other in a circle: a from a", "sft.runs.0.base_stage"),
    (['name = "a"\nbase_stage = "b"', 'name = "b"\nbase_stage = "a"'], "circle: a from b from a", "sft.runs.0.base_stage"),
    (["epochs = 1"], "sft.runs.0.name is missing", "sft.runs.0"),
    (['name = "a"\nepoch = 1'], "unknown key sft.runs.0.epoch", "sft.runs.0.epoch"),
    (['name = "a"\nruns = []'], "unknown key sft.runs.0.runs", "sft.runs.0.runs"),
    (['name = "a"\nepochs = "two"'], "sft.runs.0.epochs must be a number", "sft.runs.0.epochs"),
    ([FIRST, 'name = "a"\nepochs = -1'], "run a: sft.epochs is -1.0", "sft.runs.1.epochs"),
    (['name = "a"\nlr_peak = 1e-5'], "run a: lr_final 0.0001 is not in (0, lr_peak]", "preset tiny, key sft.lr_final"),
]  # fmt: skip


@pytest.mark.parametrize(("runs", "what", "where"), REFUSED)
def test_runs_that_cannot_be_are_refused_with_their_key(runs: list[str], what: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, *runs)
    assert what in error.value.what
    assert error.value.where.endswith(where if " " in where else f"key {where}")
    assert error.value.fix


def test_names_on_the_command_line_are_checked(tmp_path: Path) -> None:
    load(tmp_path, LAST, FIRST)
    config = ["-c", str(tmp_path / "m1.toml")]
    for words, told in (
        (["sft", "--name", "second"], "there is no fine-tuning named 'second'"),
        (["evaluate", "--stage", "first"], "there is no stage 'first'"),
        (["generate", "hello", "--stage", "sft-second"], "there is no stage 'sft-second'"),
        (["export", "--stage", "second"], "there is no stage 'second'"),
    ):
        done = CliRunner().invoke(app, [*words, *config])
        assert done.exit_code == 2
        assert told in done.output
    job = CliRunner().invoke(app, ["launch", "slurm", "--out", str(tmp_path / "x"), "--", "sft", *config])
    assert "a job trains one fine-tuning, and 2 are configured" in job.output


def test_plain_fine_tuning_starts_from_a_stage_or_an_import(tmp_path: Path) -> None:
    assert load(tmp_path, overrides=("sft.base_stage=import",)).config.sft.base_stage == "import"
    with pytest.raises(ConfigError, match="base_stage 'first' is not a stage"):
        load(tmp_path, FIRST, overrides=("sft.base_stage=first",))


def test_checkpoints_of_a_run_are_found_and_swept(tmp_path: Path) -> None:
    for name in ("step_00000007-sft-math_2", "step_00000007-sft-math.tmp-0123abcd", "step_00000007-sft-math.before-1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in step_directories(tmp_path)] == ["step_00000007-sft-math_2"]
    assert [path.name for path in left_behind(tmp_path)] == ["step_00000007-sft-math.tmp-0123abcd"]


def test_an_interrupted_run_keeps_its_checkpoints_while_another_goes_on(tmp_path: Path) -> None:
    def committed(step: int, stage: str, **more: Any) -> Committed:
        return Committed(path=tmp_path / f"{step}-{stage}", meta=meta(step, stage=stage, **more), files={}, sha256="")

    found = [committed(step, "sft-b") for step in (24, 23, 22, 21)]
    found += [committed(step, "sft-a") for step in (13, 12, 11)] + [committed(10, "32k", final=True)]
    verified = {c.path for c in found}
    assert [c.path.name for c in replaced(found, verified, 2)] == ["22-sft-b", "21-sft-b", "11-sft-a"]
    ended = [*found, committed(9, "sft-a", final=True)]
    assert [c.path.name for c in replaced(ended, verified, 2)] == [
        "22-sft-b", "21-sft-b", "13-sft-a", "12-sft-a", "11-sft-a",
    ]  # fmt: skip
