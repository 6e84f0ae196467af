"""The predicted wall time of a stage: what it is made of, and what changes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.plans import m1_plan, resolved

from m1_stages.plan.estimate import Plan, make_plan
from m1_stages.plan.goodput import WallTime, predict_wall_time
from m1_stages.plan.hardware import CALIBRATION, gpu_named
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory.host import SaveMode, host_snapshot_bytes
from m1_stages.plan.stage_workload import model_with_vocab, stage_workloads


def plan_of(folder: Path, *overrides: str, gpus: int = 1) -> Plan:
    return make_plan(resolved(folder, "700m", *overrides), gpu_named("h200"), gpus)


def wall_time(plan: Plan, stage: int = 0) -> WallTime:
    found = plan.stages[stage].wall_time
    assert found is not None
    return found


def test_each_part_of_a_stage(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "run.save_every_steps=1000")
    time, first = wall_time(plan), plan.stages[0]
    copied, _ = host_snapshot_bytes(
        model_with_vocab(resolved(tmp_path, "700m").config), Layout(), bf16=True, per_node=8
    )
    assert copied == pytest.approx(9.9e9, rel=0.01)
    assert time.steps_s == 5722 * first.layouts[0].mix_time.total
    assert time.saves == 6, "after 1,000 to 5,000 steps, and at the end"
    assert time.save_stall_s == pytest.approx(CALIBRATION.save_plan_s + copied / 8e9)
    assert time.saves_s == pytest.approx(6 * time.save_stall_s)
    assert time.save_commit_s == pytest.approx(time.save_stall_s + copied / 1e9)
    assert time.start_s == pytest.approx(CALIBRATION.start_s + copied / 2e9)
    assert time.total_s == time.steps_s + time.saves_s + time.evaluation_s + time.start_s
    assert time.goodput == time.steps_s / time.total_s
    assert 0.99 < time.goodput < 1.0


def test_saves_that_wait_or_come_too_often(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "run.save_every_steps=1000")
    off = wall_time(plan_of(tmp_path, "run.save_every_steps=1000", "run.async_save=off"))
    beside = wall_time(plan)
    write = beside.save_commit_s - beside.save_stall_s
    assert off.saves_s == pytest.approx(6 * off.save_commit_s) == pytest.approx(6 * (beside.save_stall_s + write))
    step_s = plan.stages[0].layouts[0].mix_time.total
    often = wall_time(plan_of(tmp_path, "run.save_every_steps=1"))
    assert often.saves == 5722
    assert often.save_stall_s == pytest.approx(beside.save_stall_s + write - step_s), "the next one waits for it"


def test_a_distributed_optimizer_is_gathered_through_the_host(tmp_path: Path) -> None:
    sharded = wall_time(plan_of(tmp_path, "parallel.distributed_optimizer=true", gpus=2))
    copied, _ = host_snapshot_bytes(
        model_with_vocab(resolved(tmp_path, "700m").config), Layout(data=2), bf16=True, per_node=8
    )
    gathered = 2 * copied * 12 / 14  # each of the two copies a half, and gathers all
    assert sharded.save_stall_s == pytest.approx(CALIBRATION.save_plan_s + gathered / 4e9 + copied / 8e9)


def test_evaluation_is_its_forward_passes(tmp_path: Path) -> None:
    """A stage of 1M tokens: documents count as rows, whole and in pieces; half as many halve their part."""
    config = resolved(tmp_path, "700m").config
    (*_, stage) = stage_workloads(config)
    needles = [(24, round(share * 1_048_576)) for share in config.evaluate.lengths]
    assert stage.evaluated == (*needles, (16, 1_048_576))
    plan = plan_of(tmp_path, "evaluate.documents=8")
    eight, four, none = (wall_time(plan_of(tmp_path, f"evaluate.documents={n}"), 4).evaluation_s for n in (8, 4, 0))
    assert eight - four == pytest.approx(four - none)
    step = plan.stages[4].layouts[0].time  # of one row of 1M tokens, its layers recomputed
    third = (step.total - step.optimizer) / 3
    assert 0.7 * third < (eight - none) / 16 < third
    assert none < 24 * third * 2, "needles of 1M tokens and of half, a quarter, ..."
    assert wall_time(plan_of(tmp_path, "evaluate.enabled=false"), 4).evaluation_s == 0
    two = wall_time(plan_of(tmp_path, "parallel.context=1", gpus=2), 4)
    assert two.evaluation_s < 0.8 * eight, "two GPUs share the rows"


def test_short_rows_are_shared_by_the_ranks(tmp_path: Path) -> None:
    """24 rows of 2,048 tokens are one pass of one GPU; two GPUs take 12 each."""
    settings = ["evaluate.lengths=[0.0625]", "evaluate.documents=0"]
    one, two = (plan_of(tmp_path, *settings, gpus=gpus) for gpus in (1, 2))
    assert two.stages[0].layouts[0].layout.data == 2
    passes = wall_time(two).evaluation_s / wall_time(one).evaluation_s
    assert passes == pytest.approx(12 / 24)


def test_what_is_not_known_is_not_predicted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    stage = plan.stages[0]
    m = model_with_vocab(resolved(tmp_path, "700m").config)
    x = stage.layouts[0]
    endless = replace(stage.workload, steps=None)
    assert predict_wall_time(m, endless, plan.machine, x, save_every_steps=100) is None
    assert predict_wall_time(m, stage.workload, plan.machine, replace(x, saves=None), save_every_steps=100) is None
    waits = replace(x, saves=SaveMode(background=False, copy_gib=1.0, why=""))
    assert predict_wall_time(m, stage.workload, plan.machine, waits, save_every_steps=100) is not None


def test_the_plan_shows_it(tmp_path: Path) -> None:
    said = m1_plan("--preset", "700m", "--gpu", "h200", cwd=tmp_path).stdout
    time = wall_time(plan_of(tmp_path))
    assert f"│ steps (goodput)            │ {time.goodput:.2%} │" in said
    stages = json.loads(m1_plan("--preset", "700m", "--gpu", "h200", "--json", cwd=tmp_path).stdout)["stages"]
    assert stages[0]["wall_time"] == time.as_dict()
