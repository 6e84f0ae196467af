"""Every layout trains like one process: losses, gradient norms, balance loss and expert load over 20 steps."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from support.layouts import LAYOUTS, relative, rows_together, world, worst
from support.ranks import run_on_ranks

STEPS = 20
FEW_STEPS = 4
"""Enough for every mutation below to pass its bound; equality is held over all ``STEPS``."""
LOSS_BOUND, NORM_BOUND = 1e-6, 1e-5
CLEARLY = 30
"""A mutation counts as found when it passes a bound so many times; the weakest here does 65 times."""


def records(
    world: int,
    *,
    steps: int = STEPS,
    mutation: str = "",
    micro_batch: int = 0,
    untrained: Any = (),
    dropped: Any = (),
    bucket: int = 0,
    lora: Any = (),
    **parallel: Any,
) -> list[dict[str, Any]]:
    """Of each rank. ``micro_batch`` rows at a time; 0: each rank all of its rows at once."""
    job: dict[str, Any] = {"parallel": parallel, "steps": steps, "mutation": mutation, "untrained": untrained}
    job |= {"dropped": dropped} | ({"bucket": bucket} if bucket else {}) | ({"lora": lora} if lora else {})
    return _trained(world, json.dumps(job | ({"micro_batch": micro_batch} if micro_batch else {}), sort_keys=True))


@cache
def _trained(world: int, job: str) -> list[dict[str, Any]]:
    return run_on_ranks(world, "distributed.parity_worker:train", json.loads(job))


def alone_as(layout: dict[str, Any], **job: Any) -> dict[str, Any]:
    """One process over the rows that all ranks process together: the balance loss is taken over them."""
    return records(1, micro_batch=rows_together(layout, world(layout)), **job)[0]


LAYERS = {
    "PP2": [[[1, 2, 3, 4]], [[5, 6, 7, 8]]],
    "PP2 uneven": [[[1, 2, 3, 4, 5]], [[6, 7, 8]]],
    "PP2 VPP2": [[[1, 2], [5, 6]], [[3, 4], [7, 8]]],
    "PP4 VPP2": [[[1], [5]], [[2], [6]], [[3], [7]], [[4], [8]]],
    "PP2 VPP2 EP2": [[[1], [5, 6, 7]]] * 2 + [[[2, 3, 4], [8]]] * 2,
}
"""Of each rank's chunks."""


def assert_same_run(spread: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in spread:
        assert worst(rank["losses"], alone["losses"]) < LOSS_BOUND
        assert worst(rank["aux"], alone["aux"]) < LOSS_BOUND
        assert relative(rank["grad_norms"], alone["grad_norms"]) < NORM_BOUND
        for a, b in zip(rank["layer_norms"], alone["layer_norms"], strict=True):
            assert len(a) == 8
            assert relative(a, b) < 10 * NORM_BOUND, "one layer's norm is smaller, and so noisier, than the whole"
        assert rank["load"] == alone["load"]
        assert rank["trained_tokens"] == alone["trained_tokens"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str) -> None:
    layout = LAYOUTS[name]
    alone, spread = alone_as(layout), records(world(layout), **layout)
    assert spread[-1]["topology"]["world"] == world(layout)
    if any(layout.get(axis, 1) > 1 for axis in ("tensor", "pipeline", "expert")):
        assert spread[-1]["local_parameters"] < 0.9 * alone["local_parameters"], "the model was not sharded"
    if layout.get("overlap_grad_reduce"):
        assert min(spread[0]["buckets"][0]) > 1, "there is nothing to overlap with"
    if name in LAYERS:
        assert [rank["layers"] for rank in spread] == LAYERS[name]
    if layout.get("context", 1) > 1:
        assert spread[-1]["longest_crossing"] == (3 if name in ("CP2", "CP4") else 1)
    assert alone["losses"][0] - alone["losses"][-1] > 1.0, "the run must learn, or equality says little"
    assert_same_run(spread, alone)


def times_over(wrong: list[dict[str, Any]], right: dict[str, Any]) -> float:
    """How many times the larger of the differences passes the bound that equality is held to."""
    losses = worst(wrong[-1]["losses"], right["losses"][:FEW_STEPS])
    norms = relative(wrong[-1]["grad_norms"], right["grad_norms"][:FEW_STEPS])
    return max(losses / LOSS_BOUND, norms / NORM_BOUND)


@pytest.mark.parametrize(
    ("layout", "mutation"),
    [
        ("CP2", "no state from earlier shards"),
        ("CP2", "no decay on the state from earlier shards"),
        ("CP2", "no gradient to earlier shards"),
        ("CP2", "keys in rank order"),
        ("CP2", "positions of contiguous shards"),
        ("CP2", "key gradients not summed"),
        ("CP2", "balance loss over TP x CP"),
        ("CP2", "trained tokens of the whole sequence on every rank"),
        ("TP2", "balance loss over TP x CP"),
        ("TP2", "every rank takes the first heads' slopes"),
        ("PP2", "every stage takes the first layers' slopes"),
        ("PP2 VPP2", "batched messages"),
        ("TP2", "no reduction in the sharded norm, forward"),
        ("TP2", "no reduction in the sharded norm, backward"),
        ("TP2", "norm weight not sequence parallel"),
        ("TP2", "router weight not sequence parallel"),
        ("TP2", "expert gradients in the dense groups"),
        ("TP2", "sharded weights not marked"),
        ("TP2 ETP2", "experts missing from the gradient norm"),
    ],
)
def test_parity_fails_when_the_code_is_wrong(layout: str, mutation: str) -> None:
    wrong = records(2, steps=FEW_STEPS, mutation=mutation, **LAYOUTS[layout])
    assert sum(rank["mutated"] for rank in wrong) > 0, "the mutated function was not called"
    assert times_over(wrong, alone_as(LAYOUTS[layout])) > CLEARLY


@pytest.mark.parametrize("layout", ["EP2", "PP2"])
def test_weights_drawn_in_module_order_depend_on_the_layout(layout: str) -> None:
    """Megatron's own initialisation on a CPU: every weight is random, the losses fall, and yet it is another model."""
    job: dict[str, Any] = {"steps": 1, "mutation": "weights drawn in module order"}
    wrong, alone = records(2, **job, **LAYOUTS[layout]), alone_as(LAYOUTS[layout], **job)
    assert min(rank["mutated"] for rank in (*wrong, alone)) == 1
    assert worst(wrong[-1]["losses"], alone["losses"]) > CLEARLY * LOSS_BOUND


@pytest.mark.parametrize("name", ["DP2 overlap", "DP2 distributed optimizer, overlap"])
def test_dropped_updates_leave_no_trace_where_communication_overlaps(name: str) -> None:
    """The gradients of the second and third step are looked at and dropped: the weights stay, and training goes on."""
    layout, job = LAYOUTS[name], {"steps": 6, "dropped": [1, 2]}
    alone = alone_as(layout, **job)
    assert alone["losses"][1] == alone["losses"][2] == alone["losses"][3] != alone["losses"][4]
    assert_same_run(records(2, **job, **layout), alone)


def test_parameters_used_before_they_are_gathered_are_old() -> None:
    """Megatron waits in modules that our layers pass over. One bucket, as a model of this size has: nothing else notices."""
    layout, job = LAYOUTS["DP2 distributed optimizer, overlap"], {"steps": FEW_STEPS, "bucket": 10**6}
    wrong = records(2, mutation="parameters used before they are gathered", **job, **layout)
    assert [rank["mutated"] for rank in wrong] == [1, 1]
    assert times_over(wrong, alone_as(layout)) > CLEARLY


@pytest.mark.parametrize("mutation", ["", "parameters not gathered after the last update"])
def test_parameters_are_whole_when_they_are_read(mutation: str) -> None:
    """Of an overlapped gather, as a checkpoint reads them: the last update is in the shards of each rank only."""
    ranks = records(2, steps=FEW_STEPS, mutation=mutation, **LAYOUTS["DP2 distributed optimizer, overlap"])
    assert [rank["mutated"] for rank in ranks] == [int(bool(mutation))] * 2
    differ = abs(ranks[0]["weights"] - ranks[1]["weights"]) / ranks[0]["weights"]
    assert differ > 1e-4 if mutation else differ == 0.0


# Row, first token, end: what rank 0 of two holds when they share one row at a time, or two.
FIRST_OF_ROWS = [(row, *span) for row in range(4) for span in ((0, 16), (48, 64))]
FIRST_OF_PAIRS = [(row, *span) for row in range(4) for span in (((0, 32),) if row % 2 == 0 else ((32, 64),))]
UNTRAINED: dict[str, tuple[dict[str, Any], list[tuple[int, int, int]]]] = {
    "DP2, one rank": (LAYOUTS["DP2"], [(0, 0, 64), (1, 0, 64)]),
    "DP2, one rank, distributed optimizer": (LAYOUTS["DP2 distributed optimizer"], [(2, 0, 64), (3, 0, 64)]),
    "EP2, one rank": (LAYOUTS["EP2"], [(0, 0, 64), (1, 0, 64)]),
    "CP2, one rank": (LAYOUTS["CP2"], FIRST_OF_ROWS),
    "CP2 EP2, one rank": (LAYOUTS["CP2 EP2"], FIRST_OF_PAIRS),
    "DP2, a micro-batch of one rank": ({"micro_batch": 1}, [(2, 0, 64)]),
    "CP2, a micro-batch": (LAYOUTS["CP2"], [(2, 0, 64)]),
    "PP2, first and last micro-batch": (LAYOUTS["PP2"], [(0, 0, 64), (3, 0, 64)]),
    "TP2, a micro-batch": ({"tensor": 2, "micro_batch": 1}, [(1, 0, 64)]),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_tokens_without_loss_on_a_whole_rank_or_micro_batch(name: str) -> None:
    layout, untrained = UNTRAINED[name]
    job: dict[str, Any] = {"steps": FEW_STEPS, "untrained": untrained}
    alone, spread = alone_as(layout, **job), records(world(layout), **job, **layout)
    own = [rank["own_trained_tokens"][0] for rank in spread]
    if "one rank" in name and "micro-batch" not in name:
        assert 0 in [sum(tokens) for tokens in own], "every rank has trained tokens"
    assert any(0 in tokens for tokens in own)
    assert alone["losses"][0] - alone["losses"][-1] > 0.5
    assert_same_run(spread, alone)


def test_the_loss_is_the_mean_over_trained_tokens() -> None:
    """Cut into micro-batches or not, and also where most micro-batches have none: rows weigh as many tokens as they train."""
    whole, cut = (
        records(1, steps=1, untrained=[(0, 1, 64), (1, 0, 64), (2, 0, 64)], micro_batch=rows)[0] for rows in (4, 1)
    )
    rows = [records(1, steps=1, untrained=[(row, 0, 64) for row in range(4) if row != one])[0] for one in range(4)]
    assert [row["trained_tokens"][0] for row in rows] == [63, 61, 62, 61]
    everything = records(1, steps=1)[0]
    weighted = sum(row["losses"][0] * row["trained_tokens"][0] for row in rows) / 247
    assert (everything["trained_tokens"], everything["losses"][0]) == ([247], pytest.approx(weighted, abs=1e-6))
    assert (whole["trained_tokens"], cut["trained_tokens"]) == ([62], [62])
    assert whole["losses"][0] == pytest.approx(cut["losses"][0], abs=1e-6)


@pytest.mark.parametrize("name", ["DP2", "CP2"])
def test_a_step_without_any_trained_token_has_no_gradient(name: str) -> None:
    for rank in records(2, steps=2, untrained=[(row, 0, 64) for row in range(4)], **LAYOUTS[name]):
        assert (rank["trained_tokens"], rank["losses"], rank["grad_norms"]) == ([0, 0], [0.0, 0.0], [0.0, 0.0])
