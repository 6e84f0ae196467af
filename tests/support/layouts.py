"""The layouts of a few ranks that must train alike, and how far two runs differ."""

from __future__ import annotations

import math
from typing import Any

OVERLAP: dict[str, Any] = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "EP2": {"expert": 2},
    "DP2": {},
    "PP2": {"pipeline": 2, "micro_batch": 1},
    "DP2 distributed optimizer": {"distributed_optimizer": True},
    "CP2": {"context": 2, "micro_batch": 1},
    "CP2 EP2": {"context": 2, "expert": 2, "micro_batch": 2},
    "CP2 distributed optimizer": {"context": 2, "distributed_optimizer": True, "micro_batch": 2},
    "CP4": {"context": 4, "micro_batch": 2},
    "TP2 CP2": {"tensor": 2, "context": 2, "micro_batch": 2},
    "TP2 EP2": {"tensor": 2, "expert": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2, "micro_batch": 2},
    "PP2 EP2": {"pipeline": 2, "expert": 2, "micro_batch": 1},
    "DP2 overlap": {"overlap_grad_reduce": True, "micro_batch": 1},
    "DP2 distributed optimizer, overlap": OVERLAP,
    "PP2 VPP2 EP2 overlap": {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "micro_batch": 1} | OVERLAP,
    "EP2 allgather": {"expert": 2, "dispatcher": "allgather"},
    "TP2 EP2 ETP2 allgather": {"tensor": 2, "expert": 2, "expert_tensor": 2, "dispatcher": "allgather"},
    "PP2 uneven": {"pipeline": 2, "pipeline_layers": [5, 3], "micro_batch": 1},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2, "micro_batch": 1},
    "PP4 VPP2": {"pipeline": 4, "virtual_pipeline": 2, "micro_batch": 1},
    "PP2 VPP2 EP2": {
        "pipeline": 2,
        "virtual_pipeline": 2,
        "pipeline_layers": [1, 3, 3, 1],
        "expert": 2,
        "micro_batch": 1,
    },
}
"""With context parallelism one or two rows at a time: with all four the shards would end where rows do, and no document
would cross to another rank. CP2 and CP4 have documents over four shards, so that states decay on their way."""


def world(layout: dict[str, Any]) -> int:
    sizes = [layout.get(axis, 1) for axis in ("tensor", "pipeline", "context")]
    return max(
        2,
        sizes[0] * sizes[1] * sizes[2],
        math.prod(layout.get(axis, 1) for axis in ("pipeline", "expert", "expert_tensor")),
    )


def rows_together(layout: dict[str, Any], ranks: int) -> int:
    """Rows that all of ``ranks`` process together, which is what one process has to; 0: all."""
    shared = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    return int(layout.get("micro_batch", 0)) * (ranks // shared)


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))
