"""``m1 plan``: the layouts it chooses, what it says, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.plans import m1_plan, resolved
from support.records import record

from m1_stages.config import STAGE_NAMES
from m1_stages.errors import ConfigError
from m1_stages.events import RunStarted, StageStarted, StepDone
from m1_stages.plan.estimate import make_plan
from m1_stages.plan.hardware import gpu_named
from m1_stages.plan.memory import Activations

CASES = [("700m", 1, "h200"), ("700m", 2, "h100"), ("7b-a1b", 8, "h100"), ("m1-456b", 512, "h800")]


@pytest.mark.parametrize(("preset", "gpus", "gpu"), CASES)
def test_layouts_pass_the_trainers_own_checks(
    preset: str, gpus: int, gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.distributed as dist

    from m1_data.sampling.loader import batch_rows
    from m1_stages.runtime import parallel
    from m1_stages.runtime.device import Device

    class Reached(Exception):
        """Past all checks."""

    def stop(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(dist, "init_process_group", stop)
    monkeypatch.setattr(dist, "HashStore", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("RANK", "0")
    device = Device(name="cuda", torch_device=torch.device("cuda"), backend="nccl", why="")
    base = resolved(tmp_path, preset)
    plan = make_plan(base, gpu_named(gpu), gpus)
    assert plan.change is None
    for stage in plan.stages:
        assert 1 <= len(stage.layouts) <= 3
        assert len({x.layout for x in stage.layouts}) == len(stage.layouts)
        assert [x.time.total for x in stage.layouts] == sorted(x.time.total for x in stage.layouts)
        for x in stage.layouts:
            assert x.fits
            assert x.memory.needed < gpu_named(gpu).memory_gib
            assert x.layout.gpus == gpus
            sets = x.layout.arguments(base.config.parallel).replace("--set ", "").split()
            config = resolved(tmp_path, preset, *sets).config  # config.check
            assert {name: getattr(config.parallel, name) for name in x.layout.settings()} == x.layout.settings()
            with pytest.raises(Reached):
                parallel.start(config.parallel, device=device, seed=0)
            rows = batch_rows(
                0, global_batch=stage.workload.rows, dp_rank=0, dp_size=x.layout.data, micro_batch=x.micro_batch_rows
            )
            assert len(rows) == x.micro_batches
            tokens = x.micro_batch_rows * stage.workload.seq_len
            assert tokens % (2 * x.layout.context if x.layout.context > 1 else 1) == 0
            assert tokens // x.layout.context % x.layout.tensor == 0
            assert x.layout.tensor <= gpu_named(gpu).gpus_per_node


def test_nothing_fits_and_one_sentence_says_what_would(tmp_path: Path) -> None:
    done = m1_plan("--preset", "m1-456b", "--gpus", "8", "--gpu", "h100", cwd=tmp_path)
    assert done.returncode == 3
    error, where, fix = done.stderr.strip().splitlines()
    assert error.startswith("error: m1-456b does not fit on 8 h100: ")
    assert "GiB of each GPU, which has 79" in error
    assert where.strip() == "where: stages 32k, 128k, 256k, 512k, 1m"
    assert "take 256 h100 instead of 8" in fix
    assert "Traceback" not in done.stderr
    assert "456.1B parameters" in done.stdout, "what is known is shown all the same"


def test_the_smallest_change_comes_first(tmp_path: Path) -> None:
    plan = make_plan(resolved(tmp_path, "7b-a1b", "run.recompute=never"), gpu_named("h100"), 8)
    assert plan.change is not None
    assert plan.change.fix == "recompute activations: --set run.recompute=auto"
    assert make_plan(resolved(tmp_path, "7b-a1b"), gpu_named("h100"), 8).change is None
    wide = ["stages.1m.context_tokens=2_621_440", "stages.1m.global_batch_tokens=2_621_440"]
    plan = make_plan(resolved(tmp_path, "700m", *wide), gpu_named("h200"), 1)
    assert plan.change is not None
    assert plan.change.fix == "keep more in host memory: --set run.offload_activations=true"
    plan = make_plan(resolved(tmp_path, "700m", "stages.1m.micro_batch_rows=4"), gpu_named("h200"), 1)
    assert plan.change is None, "a step of one row is one row at a time"
    big = ["stages.1m.micro_batch_rows=4", "stages.1m.global_batch_tokens=4194304"]
    plan = make_plan(resolved(tmp_path, "700m", *big), gpu_named("h200"), 1)
    assert plan.change is not None
    assert plan.change.fix == "take one row at a time: --set stages.1m.micro_batch_rows=1"
    plan = make_plan(resolved(tmp_path, "700m"), gpu_named("h200"), 3)
    assert plan.change is not None
    assert "take 2 or 4 h200" in plan.change.fix


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="h100, h800, h200"):
        gpu_named("h300")
    done = m1_plan("--preset", "700", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 700m?" in done.stderr


def test_json_has_everything_and_only_numbers(tmp_path: Path) -> None:
    done = m1_plan("--preset", "7b-a1b", "--gpus", "8", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(plan) == {
        "preset", "gpu", "gpus", "gpu_memory_gib", "node_memory_gib",
        "precision", "recompute", "offload_activations", "offload_optimizer",
        "fits", "change", "parameters", "generation", "stages", "not_compared",
    }  # fmt: skip
    assert (plan["gpu"], plan["gpus"], plan["fits"], plan["change"]) == ("h100", 8, True, None)
    assert [stage["stage"] for stage in plan["stages"]] == list(STAGE_NAMES)
    for stage in plan["stages"]:
        assert set(stage) == {
            "stage", "seq_len", "rows_per_step", "tokens_per_step", "steps", "flops_per_token", "flops_per_token_mix",
            "flops_per_step", "layouts", "wall_time", "configured", "measured",
        }  # fmt: skip
        for layout in stage["layouts"]:
            assert set(layout) == {
                "parallel", "data", "arguments", "micro_rows", "micro_batches", "fits", "activations", "memory_gib",
                "host_memory_gib",
                "saves", "step_s", "step_s_mix", "tokens_per_s_per_gpu", "mfu", "gpu_hours", "gpu_hours_mix",
            }  # fmt: skip
            assert 0 < layout["mfu"] < 1
            hours = stage["steps"] * layout["step_s"]["total"] * 8 / 3600
            assert layout["gpu_hours"] == pytest.approx(hours)
            assert layout["step_s_mix"]["total"] <= layout["step_s"]["total"]


def test_measured_steps_stand_beside_the_estimate(tmp_path: Path) -> None:
    stage = resolved(tmp_path, "700m").config
    begun = {"stage": "32k", "seq_len": 32_768, "global_batch_rows": stage.global_batch_rows("32k")}
    sizes = {"world": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    events = [
        record(RunStarted, device="cuda", topology=sizes),
        record(StageStarted, **begun),
        *(record(StepDone, stage="32k", step_s=100.0 if i < 3 else 4.0, peak_gib=15.0) for i in range(8)),
    ]
    (tmp_path / "run").mkdir()
    text = "\n".join(json.dumps(event) for event in events) + '\n{"torn'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    plan = make_plan(resolved(tmp_path, "700m"), gpu_named("h200"))
    first, *others = (stage.compared for stage in plan.stages)
    assert others == [None] * 4
    assert first is not None
    assert (first.measured.steps, first.measured.step_s, first.measured.peak_gib) == (8, 4.0, 15.0)
    assert first.time_deviation == pytest.approx(plan.stages[0].layouts[0].time.total / 4.0 - 1)
    assert not first.estimate.activations.recompute
    assert plan.not_compared == {}
    done = m1_plan("--gpu", "h200", cwd=tmp_path)
    assert "Measured in this run" in done.stdout, done.stderr
    assert f"{first.memory_deviation:+.0%}" in done.stdout
    events[1] |= {"recompute": True, "offload_activations": True}
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(json.dumps(event) for event in events))
    compared = make_plan(resolved(tmp_path, "700m"), gpu_named("h200")).stages[0].compared
    assert compared is not None
    assert compared.estimate.activations == Activations(recompute=True, offload=True)


def test_why_a_stage_that_ran_is_not_compared(tmp_path: Path) -> None:
    sizes = {"world": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    cases = {
        "it ran on a cpu, and estimates are for GPUs": ("cpu", 8, 32_768, {}),
        "it has finished no step": ("cuda", 0, 32_768, {}),
        "metrics.jsonl does not say in which layout it ran": ("cuda", 8, 4096, {"dp": 0}),
        "metrics.jsonl has a step without time or memory": ("cuda", 8, 4096, {"step_s": None}),
        "it ran with 32 rows of 4,096 tokens a step": ("cuda", 8, 4096, {}),
    }
    (tmp_path / "run").mkdir()
    for why, (device, steps, seq_len, odd) in cases.items():
        measured = {"step_s": 4.0, "peak_gib": 15.0} | {key: odd[key] for key in odd if key == "step_s"}
        events = [
            record(RunStarted, device=device, topology=sizes | {key: odd[key] for key in odd if key in sizes}),
            record(StageStarted, stage="32k", seq_len=seq_len, global_batch_rows=32),
            *(record(StepDone, stage="32k", **measured) for _ in range(steps)),
        ]
        (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(json.dumps(event) for event in events))
        plan = make_plan(resolved(tmp_path, "700m"), gpu_named("h200"))
        assert plan.not_compared == {"32k": why}
        assert plan.stages[0].compared is None
    done = m1_plan("--gpu", "h200", cwd=tmp_path)
    assert f"stage 32k of this run is not compared: {why}" in done.stdout


def test_memory_is_compared_from_the_first_step_and_time_after_the_warm_up(tmp_path: Path) -> None:
    rows = resolved(tmp_path, "700m").config.global_batch_rows("32k")
    sizes = {"world": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    events = [
        record(RunStarted, device="cuda", topology=sizes),
        record(StageStarted, stage="32k", seq_len=32_768, global_batch_rows=rows),
        record(StepDone, stage="32k", step_s=9.0, peak_gib=20.0),
        *(record(StepDone, stage="32k", step_s=9.0, peak_gib=10.0) for _ in range(2)),
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(json.dumps(event) for event in events))
    plan = make_plan(resolved(tmp_path, "700m"), gpu_named("h200"))
    first = plan.stages[0].compared
    assert first is not None
    assert (first.measured.steps, first.measured.step_s, first.measured.peak_gib) == (3, None, 20.0)
    assert (first.time_deviation, first.mix_time_deviation) == (None, None)
    assert first.memory_deviation == pytest.approx(first.estimate.memory.peak / 20.0 - 1)
    assert plan.not_compared == {}
    done = m1_plan("--gpu", "h200", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"20.0 │ {first.estimate.memory.peak:8.1f} │ {first.memory_deviation:+6.0%} │" in done.stdout
    assert (
        "stage 32k: the time of a step is not compared: the run has 3 of them, and the first 3 are warm-up"
        in done.stdout
    )
    as_json = json.loads(m1_plan("--gpu", "h200", "--json", cwd=tmp_path).stdout)["stages"][0]["measured"]
    assert (as_json["step_s"], as_json["time_deviation"], as_json["peak_gib"]) == (None, None, 20.0)


def test_the_command_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from m1cli.app import app\n"
        "try: app(['plan', '--preset', 'm1-456b', '--gpus', '512', '--gpu', 'h800'])\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        "print('LOADED', [m for m in ('torch', 'megatron', 'numpy', 'transformers') if m in sys.modules])"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100"}
    )
    seconds = time.perf_counter() - began
    assert done.stdout.strip().endswith("LOADED []"), done.stdout[-500:] + done.stderr[-500:]
    assert seconds < 20.0  # 0.8 s on an idle machine; a busy one must not fail the test
    for stage in STAGE_NAMES:
        assert f"{stage} #1" in done.stdout
    wide = [line for line in done.stdout.splitlines() if len(line) > 100 and "--set" not in line]
    assert not wide, wide
    assert "…" not in done.stdout, "a column is cut off at 100 columns"
