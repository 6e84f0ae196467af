"""Tensor- and expert-parallel ranks write what one process writes; further ranks are replicas."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from support.ranks import run_on_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "EP2": (2, {"expert": 2}),
    "TP2 EP2": (2, {"tensor": 2, "expert": 2}),
    "TP2 ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "EP2 PP2 as trained": (2, {"expert": 2, "pipeline": 2, "context": 2}),
    "DP2": (2, {}),
}


@cache
def alone() -> dict[str, Any]:
    (result,) = run_on_ranks(1, "distributed.generation_worker:generated", {"parallel": {}})
    return dict(result)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_write_what_one_process_writes(layout: str) -> None:
    world, sizes = LAYOUTS[layout]
    ranks = run_on_ranks(world, "distributed.generation_worker:generated", {"parallel": sizes})
    for rank, result in enumerate(ranks):
        assert result["tokens"] == alone()["tokens"]
        for mine, expected in zip(result["logprobs"], alone()["logprobs"], strict=True):
            assert mine == pytest.approx(expected, abs=2e-5)
        together = layout != "DP2"
        assert result["replica"] == ([0, 1, rank == 0] if together else [rank, 2, True])
        assert result["local"] == (2 if "expert" in sizes else 4)
        assert result["heads"] == (2 if "tensor" in sizes else 4)
    assert ranks[0]["logprobs"] == ranks[1]["logprobs"]


@pytest.mark.parametrize(("layout", "group"), [("TP2", "tp_group"), ("EP2", "expert_group")])
def test_a_sum_that_is_left_out_is_noticed(layout: str, group: str) -> None:
    world, sizes = LAYOUTS[layout]
    ranks = run_on_ranks(world, "distributed.generation_worker:generated", {"parallel": sizes, "spoil": group})
    assert ranks[0]["tokens"] != alone()["tokens"]
