"""Every layout trains like one process: losses, gradient norms, balance loss and expert load over 20 steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from parity_run import run

STEPS = 20
WRONG_STEPS = 8
"""Enough for every mutation below to pass its bound; equality is held over all ``STEPS``."""


def record(
    world: int, *, steps: int = STEPS, mutation: str = "", micro_batch: int = 0, **parallel: Any
) -> dict[str, Any]:
    """``micro_batch`` rows at a time; 0: each rank all of its rows at once."""
    job: dict[str, Any] = {"parallel": parallel, "steps": steps, "mutation": mutation}
    return run(world, json.dumps(job | ({"micro_batch": micro_batch} if micro_batch else {}), sort_keys=True))


def alone_as(name: str) -> dict[str, Any]:
    """One process over the same micro-batches: the balance loss is taken over each of them."""
    return record(1, micro_batch=LAYOUTS[name].get("micro_batch", 0))


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "EP2": {"expert": 2},
    "DP2": {},
    "PP2": {"pipeline": 2, "micro_batch": 1},
    "DP2 distributed optimizer": {"distributed_optimizer": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str) -> None:
    alone, spread = alone_as(name), record(2, **LAYOUTS[name])
    assert spread["topology"]["world"] == 2
    if "DP2" not in name:
        assert spread["local_parameters"] < 0.9 * alone["local_parameters"], "the model was not sharded"
    assert alone["losses"][0] - alone["losses"][-1] > 1.0, "the run must learn, or equality says little"
    assert worst(spread["losses"], alone["losses"]) < 1e-6
    assert worst(spread["aux"], alone["aux"]) < 1e-6
    relative = [abs(a - b) / b for a, b in zip(spread["grad_norms"], alone["grad_norms"], strict=True)]
    assert max(relative) < 1e-5
    for a, b in zip(spread["layer_norms"], alone["layer_norms"], strict=True):
        if a:
            assert worst(a, b) < 1e-5
    assert spread["load"] == alone["load"]


@pytest.mark.parametrize(
    ("layout", "mutation"),
    [
        ("TP2", "rank 1 takes rank 0's heads"),
        ("PP2", "slopes of the neighbour layer"),
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
    alone = alone_as(layout)
    wrong = record(2, steps=WRONG_STEPS, mutation=mutation, **LAYOUTS[layout])
    losses = worst(wrong["losses"], alone["losses"][:WRONG_STEPS])
    norms = max(abs(a - b) / b for a, b in zip(wrong["grad_norms"], alone["grad_norms"][:WRONG_STEPS], strict=True))
    assert losses > 1e-5 or norms > 1e-4, f"{mutation}: losses differ by {losses:.1e}, gradient norms by {norms:.1e}"
