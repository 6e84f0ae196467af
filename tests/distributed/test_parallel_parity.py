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
    """One process over the rows that all ranks process together: the balance loss is taken over them."""
    layout = LAYOUTS[name]
    ranks = world(layout) // (layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1))
    return record(1, micro_batch=layout.get("micro_batch", 0) * ranks)


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "EP2": {"expert": 2},
    "DP2": {},
    "PP2": {"pipeline": 2, "micro_batch": 1},
    "DP2 distributed optimizer": {"distributed_optimizer": True},
    "CP2": {"context": 2},
    "CP2 EP2": {"context": 2, "expert": 2},
    "CP2 distributed optimizer": {"context": 2, "distributed_optimizer": True},
    "CP4": {"context": 4},
    "TP2 CP2": {"tensor": 2, "context": 2},
    "TP2 EP2": {"tensor": 2, "expert": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2, "micro_batch": 1},
    "PP2 EP2": {"pipeline": 2, "expert": 2, "micro_batch": 1},
}


def world(layout: dict[str, Any]) -> int:
    sizes = [layout.get(axis, 1) for axis in ("tensor", "pipeline", "context")]
    return max(2, sizes[0] * sizes[1] * sizes[2], layout.get("pipeline", 1) * layout.get("expert", 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str) -> None:
    layout = LAYOUTS[name]
    alone, spread = alone_as(name), record(world(layout), **layout)
    assert spread["topology"]["world"] == world(layout)
    if any(layout.get(axis, 1) > 1 for axis in ("tensor", "pipeline", "expert")):
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
