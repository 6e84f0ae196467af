"""A fault on one rank of several: every rank decides the same at the same step, and the right rank is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.ranks import run_on_ranks

from m1_stages.runtime.stragglers import REPORT_EVERY, WINDOW, Stragglers

LAYOUTS: dict[str, dict[str, Any]] = {"DP4": {}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "CP2": {"context": 2}}


def run(world: int, **job: Any) -> list[dict[str, Any]]:
    return run_on_ranks(world, "distributed.guard_worker:train", {"parallel": {}, "steps": 4, **job})


def of(rank: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in rank["events"] if event["event"] == name]


@pytest.fixture(scope="module")
def two_steps() -> str:
    """Parameters after two good steps of DP4."""
    hashes = {rank["parameters"] for rank in run(4, steps=2)}
    assert len(hashes) == 1
    return hashes.pop()


@pytest.mark.parametrize("rank", range(4))
def test_a_loss_that_is_not_finite_on_one_rank(rank: int, two_steps: str) -> None:
    ranks = run(4, fault="nan loss", rank=rank, step=2)
    for seen in ranks:
        assert seen["error"]["code"] == 6
        assert seen["error"]["where"] == f"stage 32k, step 2, samples {8 + rank}, rank {rank}"
        assert seen["parameters"] == two_steps, "no parameter changed"
        (noticed,) = of(seen, "GuardNoticed")
        assert (noticed["step"], noticed["action"], noticed["bad_ranks"]) == (2, "stop", [rank])
        assert noticed["sample_ids"] == [8 + rank]
        assert of(seen, "StepRepeated")[0]["verdict"] == "reproducible"


@pytest.mark.parametrize("layout", ["TP2", "PP2", "CP2"])
def test_the_same_in_other_layouts(layout: str) -> None:
    """The loss of the rank that computes it: the last one."""
    ranks = run(2, parallel=LAYOUTS[layout], fault="nan loss", rank=1, step=1, micro_batch=2)
    assert [seen["error"]["code"] for seen in ranks] == [6, 6]
    assert len({seen["error"]["where"] for seen in ranks}) == 1
    assert "rank 1" in ranks[0]["error"]["where"]
    assert [len(of(seen, "StepDone")) for seen in ranks] == [1, 1]


def test_a_gradient_that_is_not_finite_without_a_loss(two_steps: str) -> None:
    for seen in run(4, fault="nan gradient", rank=3, step=2):
        assert seen["error"]["code"] == 6
        assert "gradient norm inf" in seen["error"]["what"]
        assert seen["parameters"] == two_steps


def test_skipping_goes_on_everywhere() -> None:
    ranks = run(4, fault="nan loss", rank=1, step=2, guard={"on_nonfinite": "skip"})
    assert [seen["error"] for seen in ranks] == [{}] * 4
    assert len({seen["parameters"] for seen in ranks}) == 1
    assert [of(seen, "GuardNoticed")[0]["action"] for seen in ranks] == ["skip"] * 4


@pytest.mark.parametrize(("world", "named"), [(4, "rank 2 of ranks 0, 1, 2, 3"), (2, "rank 0, 1 of ranks 0, 1")])
def test_a_flipped_bit_in_one_replica(world: int, named: str) -> None:
    """Two replicas cannot tell whose bit it is."""
    ranks = run(world, steps=6, fault="flipped bit", rank=min(2, world - 1), step=4, run={"check_replicas_every": 2})
    for seen in ranks:
        assert seen["error"]["code"] == 6
        assert f"decoder.layers.2.mlp.router.weight on {named}" in seen["error"]["what"]
        assert seen["error"]["where"] == "step 4"
    assert run(world, steps=5, run={"check_replicas_every": 1})[0]["error"] == {}


def test_experts_of_other_ranks_are_no_replicas() -> None:
    ranks = run(4, parallel={"expert": 2, "tensor": 2}, run={"check_replicas_every": 1})
    assert [seen["error"] for seen in ranks] == [{}] * 4


def test_a_slow_rank_is_named() -> None:
    ranks = run(4, steps=WINDOW + 4, fault="slow", rank=2)
    (noticed,) = of(ranks[0], "StragglerNoticed")
    assert noticed["rank"] == 2
    assert noticed["step"] <= 20
    assert noticed["seconds"] > noticed["median"] + 0.05


def test_stragglers_by_numbers() -> None:
    watch = Stragglers()
    even = [1.0, 1.01, 0.99, 1.0]
    assert [watch.notice(n, even) for n in range(30)] == [[]] * 30
    slow = [watch.notice(30 + n, [1.0, 1.0, 1.3, 1.0]) for n in range(200)]
    named = [n for n, found in enumerate(slow) if found]
    assert [len(found) for found in slow if found] == [1] * len(named)
    assert named[0] <= WINDOW
    assert [b - a for a, b in itertools.pairwise(named)] == [REPORT_EVERY] * (len(named) - 1)
    assert slow[named[0]][0][0] == 2
    one_hiccup = Stragglers()
    assert not any(one_hiccup.notice(n, [1.0, 9.0 if n == 20 else 1.0]) for n in range(40))
    assert not any(Stragglers().notice(n, [1.0]) for n in range(40))
