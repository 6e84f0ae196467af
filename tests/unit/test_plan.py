"""``m1 plan``: counts against hand and published numbers, estimates against measured steps, layouts."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from support.plans import TINY, resolved

from m1_stages.config import PRESETS, STAGE_NAMES, ModelConfig
from m1_stages.hf.tensor_names import our_shapes
from m1_stages.plan.flops import forward_flops, generation_flops, training_flops
from m1_stages.plan.hardware import GIB, GPUS
from m1_stages.plan.layout import Layout, accepts, configured_layout
from m1_stages.plan.memory import Activations, Memory, estimate_memory
from m1_stages.plan.memory.host import host_snapshot_bytes
from m1_stages.plan.memory.policy import MemoryPolicy, choose_activations, memory_policy_of
from m1_stages.plan.shapes import count_parameters, layers_of_pipeline_rank, rank_parameters
from m1_stages.plan.stage_workload import StageWorkload, model_with_vocab, stage_workloads
from m1_stages.plan.timing import CommGroup, StepTime, StepTimeModel


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_model(preset: str, tmp_path: Path) -> None:
    m = model_with_vocab(resolved(tmp_path, preset).config)
    shapes = our_shapes(m)
    idle = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name) // m.num_experts
    idle *= m.num_experts - m.experts_per_token
    tables = sum(prod(shape) for name, shape in shapes.items() if name.startswith(("embedding", "output_layer")))
    everything = sum(prod(shape) for shape in shapes.values())
    ours = count_parameters(m)
    whole = rank_parameters(m, Layout(), 0)
    padding = 2 * (m.padded_vocab_size - m.vocab_size) * m.hidden_size
    assert whole.dense + whole.experts == everything == ours.total + padding
    assert ours.active == everything - tables - idle


def test_released_size_is_the_published_one(tmp_path: Path) -> None:
    p = count_parameters(model_with_vocab(resolved(tmp_path, "m1-456b").config))
    assert p.total == pytest.approx(456e9, rel=0.01)
    assert p.active == pytest.approx(45.9e9, rel=0.01)


def test_ranks_hold_the_whole_model_together(tmp_path: Path) -> None:
    m = model_with_vocab(resolved(tmp_path, "m1-456b").config)
    layout = Layout(tensor=8, pipeline=16, expert=32, data=4, context=1)
    held = [rank_parameters(m, layout, stage) for stage in range(16)]
    assert sum(x.experts for x in held) * 32 == count_parameters(m).experts
    copied = 80 * (32 + 2) * 6144 + 6144  # routers and norms are on every tensor rank
    assert sum(x.dense for x in held) * 8 - 7 * copied == count_parameters(m).total - count_parameters(m).experts


def test_a_configured_layout_is_written_as_the_shell_takes_it(tmp_path: Path) -> None:
    keys = ("pipeline=2", "virtual_pipeline=2", "pipeline_layers=[1,3,3,1]", "expert=2", 'dispatcher="allgather"')
    config = resolved(tmp_path, "tiny", *(f"parallel.{key}" for key in keys)).config
    layout = configured_layout(config.parallel, 4)
    assert layout == Layout(
        pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 3, 3, 1), expert=2, data=2, dispatcher="allgather"
    )
    assert layout.arguments(config.parallel) == ""
    assert "--set 'parallel.pipeline_layers=[1, 3, 3, 1]' " in layout.arguments()
    assert "--set 'parallel.pipeline_layers=[]'" in Layout(pipeline=4).arguments(config.parallel)


def test_flops_of_a_model_counted_by_hand() -> None:
    f = forward_flops(TINY, pairs=10)
    # Three lightning layers: 8 x (4 x 8) + 8 x 8 weights; one softmax: 8 x (8 + 2 x 4) + 8 x 8; routers 4 x (4 x 8).
    assert f.projections == 2 * (3 * (256 + 64) + (128 + 64) + 128)
    assert f.experts == 2 * 4 * 2 * (3 * 8 * 16)
    assert f.head == 2 * 128 * 8
    assert f.softmax == 2 * 2 * 2 * 4 * 10  # scores and values, 2 heads of 4 channels, 10 tokens
    assert f.lightning == 3 * 2 * 2 * 2 * 4 * 4  # state and read-out, 3 layers, 2 heads, 4 x 4
    assert f.total == f.dense + f.softmax + f.lightning
    assert training_flops(TINY, 10).total == 3 * f.total


def test_flops_of_the_benchmark_shape(tmp_path: Path) -> None:
    """A baseline's 151,000 tokens/s at 131,072 tokens were 26.0 % of 989 TFLOP/s, counted by another program."""
    m = model_with_vocab(resolved(tmp_path, "700m").config)
    assert training_flops(m, 131_072 / 2).total * 151_000 == pytest.approx(0.260 * 989e12, rel=0.01)


def test_generation_beside_the_published_claims(tmp_path: Path) -> None:
    m = model_with_vocab(resolved(tmp_path, "m1-456b").config)
    short, long = (generation_flops(m, n, published=True) for n in (65_536, 102_400))
    assert short.ratio < 0.5
    assert long.ratio_absorbed < 0.25 < long.ratio, "the published 25 % lies between the two ways to count"
    # By hand, 64K: 2 x 45.94e9 + 70 x 64 x 4 x 128^2 + 10 x 64 x 128 x 4 x 32768 over 2 x 37e9 + 61 x 128 x 640 x 32768
    assert short.ratio == pytest.approx((91.89e9 + 0.294e9 + 10.74e9) / (74e9 + 163.7e9), rel=1e-3)


def test_documents_of_the_mix_are_no_longer_than_the_row(tmp_path: Path) -> None:
    by_stage = {workload.stage: workload for workload in stage_workloads(resolved(tmp_path, "m1-456b").config)}
    for workload in by_stage.values():
        assert 0 < workload.mix_pairs <= workload.row_pairs
    assert by_stage["32k"].mix_pairs == 32_768 / 4
    assert by_stage["128k"].mix_pairs == pytest.approx((0.3 * 16_384 + 0.7 * 81_920) / 2)


def test_sft_is_planned_when_configured(tmp_path: Path) -> None:
    assert [w.stage for w in stage_workloads(resolved(tmp_path, "700m").config)] == list(STAGE_NAMES)
    config = resolved(tmp_path, "700m", 'sft.data=["chat.jsonl"]').config
    assert [w.stage for w in stage_workloads(config)] == [*STAGE_NAMES, "sft"]


def test_frozen_weights_have_neither_gradients_nor_optimizer_state(tmp_path: Path) -> None:
    """What ``m1 plan`` and the trainer both ask: 16 and 12 bytes a trained parameter, 2 and none of a frozen one."""
    keys = ('sft.data=["chat.jsonl"]', "sft.lora_rank=16", 'sft.lora_targets=["lightning", "softmax", "router"]')
    whole, tuned = (resolved(tmp_path, "700m", *part).config for part in (keys[:1], keys))
    m, policy = model_with_vocab(whole), memory_policy_of(whole)
    hidden, width, keys_width = m.hidden_size, m.num_heads * m.head_dim, 2 * m.num_kv_heads * m.head_dim
    lightning = 7 * (hidden + 4 * width + width + hidden)
    softmax = hidden + width + keys_width + width + hidden
    adapters = 16 * (lightning + softmax + 8 * (hidden + m.num_experts))
    layout = Layout(data=2, distributed_optimizer=True)
    all_weights, lora = (
        choose_activations(m, stage_workloads(c)[-1], layout, policy, 0.0).memory for c in (whole, tuned)
    )
    assert lora.gradients * GIB == pytest.approx(4 * adapters)
    assert lora.optimizer * GIB == pytest.approx(12 * adapters / 2)
    assert (lora.weights - all_weights.weights) * GIB == pytest.approx(2 * adapters)
    assert (lora.activations, lora.head, lora.layer) == (all_weights.activations, all_weights.head, all_weights.layer)
    copied, saved = (
        host_snapshot_bytes(m, Layout(), bf16=True, per_node=8, lora=w.lora)[0]
        for w in (stage_workloads(whole)[-1], stage_workloads(tuned)[-1])
    )
    assert (
        copied - saved
        == 12 * rank_parameters(m, Layout(), 0).dense + 12 * rank_parameters(m, Layout(), 0).experts - 14 * adapters
    )


def test_memory_adds_up() -> None:
    numbers = {f.name: float(i + 1) for i, f in enumerate(fields(Memory))}
    x = Memory(**numbers)
    static = x.weights + x.gradients + x.optimizer + x.workspace
    assert x.peak == static + max(x.activations + x.states + max(x.layer + x.communication, x.head), x.update)
    assert x.needed == x.peak + x.reserve


RECORD = Path(__file__).parents[2] / "docs" / "figures" / "train-step-h200.json"


def alone(m: ModelConfig, gpu: str, tokens: int, activations: Activations) -> tuple[float, Memory]:
    """Seconds of a step of one row and one document on one GPU, and its memory."""
    model = StepTimeModel(m, Layout(), GPUS[gpu], tokens=tokens, pairs=tokens / 2, bf16=True, activations=activations)
    return model.step(1).total, estimate_memory(
        m, Layout(), tokens=tokens, micro_batches=1, bf16=True, activations=activations
    )


def test_estimates_of_the_measured_steps(tmp_path: Path) -> None:
    """Every row of one document that was measured on an H200: time and peak memory within 15 %."""
    m = model_with_vocab(resolved(tmp_path, "700m").config)
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    assert (found["device"], found["precision"], found["model"]["vocab_size"]) == ("NVIDIA H200", "bf16", m.vocab_size)
    cases = [c for c in found["cases"] if c["peer"] == "ours" and set(c["documents"]) == {1}]
    assert {c["tokens"] for c in cases} == {32_768 * n for n in (1, 4, 8, 16, 32)}
    assert {c["recompute"] for c in cases} == {True, False}
    for c in cases:
        seconds, held = alone(m, "h200", c["tokens"], Activations(recompute=c["recompute"]))
        assert seconds == pytest.approx(c["median_ms"] / 1e3, rel=0.15), c["tokens"]
        assert held.peak == pytest.approx(c["peak_gib"], rel=0.15), (c["tokens"], held)


@pytest.mark.parametrize(
    ("tokens", "recompute", "tokens_per_s", "gib"),
    [
        (32_768, True, 210_000, 14.5),
        (32_768, False, 259_100, 21.1),
        (131_072, True, 202_800, 19.9),
        (131_072, False, 225_600, 46.8),
        (1_048_576, True, 59_000, 64.0),
    ],
)
def test_estimates_of_an_older_run(
    tokens: int, recompute: bool, tokens_per_s: float, gib: float, tmp_path: Path
) -> None:
    """The same steps, kept and recomputed, on an H100 (docs/LOG.md, 2026-11-24)."""
    m = model_with_vocab(resolved(tmp_path, "700m").config)
    seconds, held = alone(m, "h100", tokens, Activations(recompute=recompute))
    assert tokens / seconds == pytest.approx(tokens_per_s, rel=0.15)
    assert held.peak == pytest.approx(gib, rel=0.15)
    assert held.weights + held.gradients + held.optimizer == pytest.approx(
        count_parameters(m).total * 18 / 2**30, rel=1e-3
    )


def test_activations_are_kept_where_they_fit_with_a_margin(tmp_path: Path) -> None:
    config = resolved(tmp_path, "700m").config
    m, policy = model_with_vocab(config), memory_policy_of(config)
    assert policy == MemoryPolicy(bf16=True, recompute="auto")

    def recomputes(gib: float, layout: Layout = Layout(), recompute: Any = "auto") -> list[bool]:  # noqa: B008
        wanted = replace(policy, recompute=recompute)
        return [
            choose_activations(m, workload, layout, wanted, gib).activations.recompute
            for workload in stage_workloads(config)
        ]

    assert recomputes(139.8) == [False, False, False, True, True]
    assert recomputes(79.2) == [False, False, True, True, True]
    assert recomputes(24.0) == [True] * 5
    assert recomputes(24.0, recompute="never") == [False] * 5
    assert recomputes(139.8, recompute="always") == [True] * 5
    workload = stage_workloads(config)[0]
    need = choose_activations(m, workload, Layout(), policy, 139.8).memory.needed
    assert not choose_activations(m, workload, Layout(), policy, need / 0.9 + 0.1).activations.recompute
    short = choose_activations(m, workload, Layout(), policy, need / 0.9 - 0.1)
    assert short.activations.recompute
    assert f"about {need:.1f} GiB would be needed, more than 90% of {need / 0.9 - 0.1:.1f} GiB" in short.why
    spread = Layout(expert=2, data=2)
    need = choose_activations(m, workload, spread, policy, 139.8).memory.needed
    assert choose_activations(m, workload, spread, policy, need / 0.8).activations.recompute, (
        "with expert parallelism a quarter stays free"
    )


def test_what_waits_in_host_memory(tmp_path: Path) -> None:
    """700m at a million tokens: 8 layer inputs of 2 GiB, of which two are on the device; 12 bytes a parameter."""
    m, tokens = model_with_vocab(resolved(tmp_path, "700m").config), 1_048_576
    here, there = (Activations(recompute=True, offload=offload) for offload in (False, True))
    seconds, held = alone(m, "h200", tokens, here)
    away_seconds, away = alone(m, "h200", tokens, there)
    assert (held.host, away.host) == (0.0, 16.0)
    assert held.activations - away.activations == pytest.approx(12.0)
    assert held.peak - away.peak == pytest.approx(10.0)  # by the largest moment, one of the eight had been given back
    assert away_seconds == seconds, "copies take 0.7 s beside 17 s of computing"
    state = estimate_memory(
        m, Layout(), tokens=tokens, micro_batches=1, bf16=True, activations=here, offload_optimizer=True
    )
    assert held.peak - state.peak == pytest.approx(held.optimizer) == pytest.approx(state.host)
    small = estimate_memory(
        m, Layout(), tokens=1024, micro_batches=1, bf16=True, activations=here, offload_optimizer=True
    )
    assert small.peak >= count_parameters(m).total * 18 / 2**30, "for the update it is all on the device"
    slow = StepTimeModel(
        m, Layout(), GPUS["h200"], tokens=tokens, pairs=tokens / 2, bf16=True, activations=here, offload_optimizer=True
    )
    assert slow.step(1).total - seconds == pytest.approx(count_parameters(m).total * 24 / 50.4e9, rel=1e-6)


def test_memory_moves_the_right_way(tmp_path: Path) -> None:
    m = model_with_vocab(resolved(tmp_path, "7b-a1b").config)

    def peak(tokens: int = 131_072, recompute: bool = True, sharded: bool = True, **sizes: int) -> float:
        layout = Layout(distributed_optimizer=sharded, **sizes)
        return estimate_memory(
            m, layout, tokens=tokens, micro_batches=8, bf16=True, activations=Activations(recompute=recompute)
        ).peak

    one = peak(data=8)
    assert peak(data=8, recompute=False) > one
    assert peak(data=8, tokens=262_144) > one
    assert peak(data=8, sharded=False) > one
    assert peak(data=8, expert=8) < one
    assert peak(context=8) < one
    assert peak(tensor=2, data=4) < one
    assert peak(pipeline=8) < one


def test_time_adds_up_and_moves_the_right_way(tmp_path: Path) -> None:
    m, gpu = model_with_vocab(resolved(tmp_path, "7b-a1b").config), GPUS["h100"]

    def step(layout: Layout, recompute: bool = True, pairs: float = 65_536, micro_batches: int = 8) -> StepTime:
        model = StepTimeModel(
            m, layout, gpu, tokens=131_072, pairs=pairs, bf16=True, activations=Activations(recompute=recompute)
        )
        return model.step(micro_batches)

    one = step(Layout())
    assert one.total == pytest.approx(sum(v for k, v in one.as_dict().items() if k != "total"))
    assert one.tensor == one.expert == one.context == one.pipeline == one.bubble == one.data == 0
    assert step(Layout(), recompute=False).total < one.total
    assert step(Layout(), pairs=1000).total < one.total
    busy = step(Layout(pipeline=4)).bubble / step(Layout(pipeline=4), micro_batches=80).bubble
    assert busy == pytest.approx(1.0), "the bubble does not depend on the number of micro-batches"
    sent, gathered = (step(Layout(expert=8, data=8, dispatcher=x)) for x in ("alltoall", "allgather"))  # type: ignore[arg-type]
    assert gathered.expert / sent.expert > 3, "every token goes to every rank, not to the two experts it wants"
    spread = step(Layout(tensor=2, pipeline=2, context=2, expert=2, data=2))
    assert min(spread.tensor, spread.pipeline, spread.context, spread.expert, spread.bubble, spread.data) > 0


def test_rings_go_by_the_slowest_link() -> None:
    gpu = GPUS["h100"]
    inside, across, alone = CommGroup(8, 1, gpu), CommGroup(16, 1, gpu), CommGroup(2, 8, gpu)
    assert (inside.ranks_on_node, across.ranks_on_node, alone.ranks_on_node) == (8, 8, 1)
    assert CommGroup(1, 1, gpu).ring_collective(1e9) == 0
    rate = [g.ring_collective(1e12) / ((g.size - 1) / g.size) for g in (inside, across, alone)]
    assert rate[0] <= rate[1] < rate[2], "one network card a machine is slower than eight"
    assert CommGroup(32, 1, gpu).all_to_all(1e9) > CommGroup(8, 1, gpu).all_to_all(1e9)


@pytest.mark.parametrize(
    ("sizes", "fine"),
    [
        ({"context": 4}, True),
        ({"context": 8}, False),  # 24 tokens are no 16 shards
        ({"context": 2, "tensor": 2}, True),
        ({"context": 4, "tensor": 2}, False),  # 6 tokens of a context rank, but 3 of a shard
        ({"tensor": 4}, False),  # two key heads
        ({"pipeline": 4}, True),
        ({"pipeline": 8}, False),
        ({"expert": 4, "data": 4}, True),
        ({"expert": 4, "data": 2}, False),  # four expert ranks in two
        ({"expert": 8, "data": 8}, False),  # four experts
        ({"data": 3}, True),
        ({"data": 5}, False),  # twelve rows a step
    ],
)
def test_layouts_that_do_not_divide_are_refused(sizes: dict[str, int], fine: bool) -> None:
    m = replace(TINY, num_kv_heads=2)
    workload = StageWorkload(
        stage="32k", config_section="", seq_len=24, rows=12, micro_batch_rows=1, steps=1, mix_pairs=6.0
    )
    assert accepts(m, Layout(**sizes), workload) is fine


def test_uneven_and_interleaved_pipelines(tmp_path: Path) -> None:
    """8 layers on 2 ranks; the softmax layer is the last."""
    m = model_with_vocab(resolved(tmp_path, "700m").config)
    split = {
        Layout(pipeline=2): [(4, 0), (3, 1)],
        Layout(pipeline=2, pipeline_layers=(3, 5)): [(3, 0), (4, 1)],
        Layout(pipeline=2, virtual_pipeline=2): [(4, 0), (3, 1)],
        Layout(pipeline=2, virtual_pipeline=2, pipeline_layers=(2, 2, 3, 1)): [(5, 0), (2, 1)],
        Layout(pipeline=3): [(3, 0), (3, 0), (1, 1)],
    }
    for layout, wanted in split.items():
        assert [layers_of_pipeline_rank(m, layout, stage) for stage in range(layout.pipeline)] == wanted
        held = [rank_parameters(m, layout, stage) for stage in range(layout.pipeline)]
        assert sum(x.dense + x.experts for x in held) == count_parameters(m).total

    def of(**sizes: Any) -> tuple[Memory, StepTime]:
        layout = Layout(pipeline=2, **sizes)
        step = StepTimeModel(
            m, layout, GPUS["h200"], tokens=131_072, pairs=1024, bf16=True, activations=Activations(recompute=True)
        )
        held = estimate_memory(
            m, layout, tokens=131_072, micro_batches=8, bf16=True, activations=Activations(recompute=True)
        )
        return held, step.step(8)

    (plain, time), (woven, woven_time) = of(), of(virtual_pipeline=2)
    assert woven_time.bubble == pytest.approx(time.bubble / 2, rel=0.01)
    assert woven_time.pipeline == pytest.approx(2 * time.pipeline)
    assert woven.activations >= plain.activations
    heavy = of(pipeline_layers=(7, 1))[1]
    assert heavy.experts == pytest.approx(time.experts * 7 / 4)
    workload = StageWorkload(
        stage="32k", config_section="", seq_len=1024, rows=6, micro_batch_rows=1, steps=1, mix_pairs=256.0
    )
    assert accepts(m, Layout(pipeline=2, virtual_pipeline=2), workload)
    assert not accepts(m, Layout(pipeline=4, virtual_pipeline=2), workload), "six micro-batches are no groups of four"
    assert not accepts(m, Layout(pipeline=3, virtual_pipeline=3), workload), "nine chunks of eight layers"


def test_rows_of_a_pass_are_those_of_the_training_loop() -> None:
    workload = StageWorkload(
        stage="32k", config_section="", seq_len=24, rows=12, micro_batch_rows=4, steps=1, mix_pairs=6.0
    )
    assert [workload.micro_batch_rows_per_rank(data) for data in (1, 2, 3, 4, 5, 6)] == [4, 3, 4, 3, 0, 2]
