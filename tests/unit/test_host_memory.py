"""Host memory of saves: what is copied, whether it fits, and what then becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import m1_plan, resolved

from m1_stages.doctor import host_memory as doctor
from m1_stages.errors import EnvironmentProblem
from m1_stages.plan.estimate import make_plan
from m1_stages.plan.hardware import CALIBRATION, GPUS, gpu_named
from m1_stages.plan.layout import Layout
from m1_stages.plan.memory.host import (
    HostMemory,
    choose_save_mode,
    host_snapshot_bytes,
    run_host_memory,
)
from m1_stages.plan.memory.policy import MemoryPolicy
from m1_stages.plan.shapes import rank_parameters
from m1_stages.plan.stage_workload import model_with_vocab
from m1_stages.runtime.device import Device
from m1_stages.runtime.parallel import Topology
from m1_stages.training import session

GIB = 2**30


@pytest.mark.parametrize(
    ("bf16", "sizes", "process", "all_ranks"),
    [
        (False, {}, 24_292_267, 24_292_267),
        (True, {}, 28_388_925, 28_388_925),
        (False, {"data": 2, "distributed_optimizer": True}, 16_201_953, 32_380_421),
        (True, {"data": 2, "expert": 2, "distributed_optimizer": True}, 14_254_552, 28_488_773),
        (False, {"tensor": 2}, 12_217_830, 24_409_902),
        (False, {"pipeline": 2}, 12_196_840, 24_291_627),
    ],
)
def test_copies_are_what_the_ranks_of_real_runs_wrote(
    bf16: bool, sizes: dict[str, Any], process: int, all_ranks: int, tmp_path: Path
) -> None:
    """Bytes of the files of tiny's checkpoints, written on a CPU by one process or two: the largest rank's, and all."""
    m = model_with_vocab(resolved(tmp_path, "tiny").config)
    m = replace(m, vocab_size=2048)
    found = host_snapshot_bytes(m, Layout(**sizes), bf16=bf16, per_node=8)
    assert found == pytest.approx((process, all_ranks), rel=0.03)


def test_the_ranks_of_a_stage_share_what_they_hold(tmp_path: Path) -> None:
    m = model_with_vocab(resolved(tmp_path, "m1-456b").config)
    layout = Layout(
        tensor=4, pipeline=2, expert=16, data=8, distributed_optimizer=True
    )  # 64 ranks, 32 a pipeline stage
    stages = [14 * (4 * x.dense + 16 * x.experts) for x in (rank_parameters(m, layout, stage) for stage in (0, 1))]
    copies = {nodes: host_snapshot_bytes(m, layout, bf16=True, per_node=nodes) for nodes in (1, 8, 32, 64, 1000)}
    assert {process for process, _ in copies.values()} == {max(stages) / 32}
    assert [copies[n][1] for n in (1, 8, 32)] == pytest.approx([max(stages) * n / 32 for n in (1, 8, 32)])
    assert copies[64][1] == copies[1000][1] == pytest.approx(sum(stages)), (
        "both stages on one node: the whole checkpoint"
    )


def test_tensors_stay_whole(tmp_path: Path) -> None:
    """700m on many ranks: gate and up of a layer's 16 experts, in fp32; where experts are cut, the table of the vocabulary."""
    m = model_with_vocab(resolved(tmp_path, "700m").config)
    experts = 4 * 16 * 2 * 1536 * 1024
    assert host_snapshot_bytes(m, Layout(data=64), bf16=True, per_node=8)[0] == pytest.approx(experts)
    assert (
        host_snapshot_bytes(m, Layout(data=128, expert=8), bf16=True, per_node=8)[0] == 4 * m.padded_vocab_size * 1024
    )


def test_what_each_part_is(tmp_path: Path) -> None:
    config = resolved(tmp_path, "700m", "optim.offload=true", "run.offload_activations=true").config
    m = model_with_vocab(config)
    rank = rank_parameters(m, Layout(), 0)
    parameters = rank.dense + rank.experts
    pinned = CALIBRATION.pinned_rounding
    need = run_host_memory(config, Layout(data=2), per_node=8, device="cuda")
    assert need.snapshot == 2 * need.largest_snapshot == pytest.approx(14 * parameters / GIB)
    assert need.optimizer == pytest.approx(pinned * 2 * 12 * parameters / GIB)
    assert need.activations == pytest.approx(pinned * 2 * 16.0), "eight inputs of 2 GiB a process"
    assert need.training == 2 * CALIBRATION.process_gib
    assert need.gathered == 0
    assert need.needed == need.snapshot + need.optimizer + need.activations + need.training
    sharded = run_host_memory(config, Layout(data=2, distributed_optimizer=True), per_node=8, device="cuda")
    assert sharded.gathered == pytest.approx(2 * 12 * parameters / GIB), "every process gathers the whole state"
    assert sharded.needed - sharded.gathered == pytest.approx(
        sharded.snapshot + sharded.optimizer + sharded.activations + sharded.training
    )
    plain = resolved(tmp_path, "700m").config
    on_cpu = run_host_memory(plain, Layout(), per_node=1, device="cpu")
    assert on_cpu.training == pytest.approx(18 * parameters / GIB), "weights, gradients, masters and moments"
    assert on_cpu.snapshot == pytest.approx(14 * parameters / GIB)


PLAIN = HostMemory(
    snapshot=14.0, largest_snapshot=14.0, gathered=0.0, optimizer=0.0, activations=0.0, training=4.0
)  # 18 GiB
OFFLOADED = replace(PLAIN, optimizer=12.0)  # 30 GiB


def policy(async_save: Any) -> MemoryPolicy:
    return MemoryPolicy(bf16=True, recompute="auto", async_save=async_save)


def test_what_is_close_is_a_warning() -> None:
    roomy = choose_save_mode(PLAIN, 18.0, policy("auto"))
    assert (roomy.background, roomy.warning) == (True, "")
    assert str(roomy) == "beside training: a copy of 14.0 GiB in a process, 14.0 GiB on a node"
    close = choose_save_mode(PLAIN, 17.0, policy("auto"))
    assert close.background, "waiting would need as much"
    assert close.warning == (
        "with a copy of 14.0 GiB in a process, 14.0 GiB on a node the run needs about 18.0 GiB of host memory on a node, "
        "which has 17.0 GiB"
    )
    assert str(close) == f"{roomy}; {close.warning}"
    assert str(choose_save_mode(PLAIN, 18.0, policy("off"))).startswith("while training waits: a copy")
    assert not choose_save_mode(PLAIN, 18.0, policy("auto"), device="cpu").background
    assert choose_save_mode(PLAIN, 18.0, policy("on"), device="cpu").background


@pytest.mark.parametrize(
    ("need", "available", "fix"),
    [
        (PLAIN, 14.3, "start fewer processes on a node, or take one with more memory"),
        (OFFLOADED, 23.9, "--set optim.offload=false, or start fewer processes"),
        (replace(PLAIN, gathered=20.0), 30.0, "--set parallel.distributed_optimizer=false"),
        (replace(PLAIN, activations=20.0), 30.0, "--set run.offload_activations=false"),
    ],
)
def test_what_clearly_does_not_fit_is_refused(need: HostMemory, available: float, fix: str) -> None:
    with pytest.raises(EnvironmentProblem) as refused:
        choose_save_mode(need, available, policy("auto"))
    assert refused.value.what.startswith("a checkpoint could not be saved: with a copy of 14.0 GiB in a process")
    assert refused.value.what.endswith(f"which has {available} GiB")
    assert refused.value.fix.startswith(fix)


def test_a_run_asks_before_it_builds_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of 700m on this machine, of four: the first pipeline rank and its data-parallel one."""
    config = resolved(tmp_path, "700m", "parallel.pipeline=2").config
    here = Topology(
        world_size=4,
        rank=0,
        local_world=2,
        tp_size=1,
        pp_size=2,
        cp_size=1,
        ep_size=1,
        etp_size=1,
        dp_size=2,
        dp_rank=0,
    )
    gpu = Device(name="cuda", torch_device=torch.device("cuda"), backend="nccl", why="a test says so")
    need = run_host_memory(config, Layout(pipeline=2, data=2), per_node=2, device="cuda").needed
    monkeypatch.setattr(session, "available_host_gib", lambda: need + 0.01)
    assert session._save_mode(config, here, gpu).background
    monkeypatch.setattr(session, "available_host_gib", lambda: 0.79 * need)
    with pytest.raises(EnvironmentProblem, match="a checkpoint could not be saved"):
        session._save_mode(config, here, gpu)


def test_the_plan_leaves_out_what_hosts_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolved(tmp_path, "7b-a1b", "parallel.distributed_optimizer=true")
    wide = make_plan(base, gpu_named("h100"), 8)
    host = wide.stages[0].layouts[0].host
    assert host.gathered > 600, "eight processes gather 7B parameters each"
    assert wide.change is None
    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], host_memory_gib=500.0))
    narrow = make_plan(base, gpu_named("h100"), 8)
    assert narrow.change is None
    for stage, before in zip(narrow.stages, wide.stages, strict=True):
        assert all(x.saves and 0.8 * x.host.needed <= 500.0 for x in stage.layouts)
        held = [x.layout for x in before.layouts if 0.8 * x.host.needed <= 500.0]
        assert [x.layout for x in stage.layouts][: len(held)] == held
    assert narrow.stages[0].layouts[0].layout != wide.stages[0].layouts[0].layout
    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], host_memory_gib=100.0))
    nowhere = make_plan(base, gpu_named("h100"), 8)
    configured, none = nowhere.stages[0].configured, nowhere.change
    assert configured is not None
    assert nowhere.machine.holds(configured.memory)
    assert (configured.saves, configured.fits) == (None, False)
    assert none is not None
    assert none.what.startswith(
        "7b-a1b fits on 8 h100, but its checkpoints do not into their hosts: the leanest layout"
    )
    assert none.what.endswith("GiB of host memory on a node to save one, which has 100")
    assert "take 32 h100 instead of 8" in none.fix


def test_the_plan_says_how_checkpoints_are_written(tmp_path: Path) -> None:
    said = m1_plan("--preset", "700m", "--gpu", "h200", cwd=tmp_path).stdout
    assert "Host memory of a node of 1 h200 in layout #1, GiB of 2,048" in said
    assert "checkpoints of 32k, 128k, 256k, 512k, 1m are written beside training: a copy of 9.2 GiB in" in said


def test_the_doctor_warns_of_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolved(tmp_path, "700m")
    need = run_host_memory(base.config, Layout(), per_node=1, device="cuda").needed
    for available, ok in ((need + 0.1, True), (need - 0.1, False), (need / 2, False)):
        monkeypatch.setattr(doctor, "available_host_gib", lambda available=available: available)
        finding = doctor.host_memory_finding(base, 1)
        assert finding.ok is ok
        assert bool(finding.fix) is not ok
        assert f"{need:,.1f}" in finding.detail
