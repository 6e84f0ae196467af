"""Adapters train alike in every layout, and what is frozen stays as it is, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.test_parallel_parity import LOSS_BOUND, NORM_BOUND, alone_as, assert_same_run, records
from support.layouts import LAYOUTS, relative, world, worst

TARGETS = ("lightning", "softmax", "router")


@pytest.mark.parametrize(
    "layout",
    [
        "TP2",
        pytest.param("CP2 EP2", marks=pytest.mark.faults),
        pytest.param("PP2 EP2", marks=pytest.mark.faults),
        pytest.param("TP2 EP2 ETP2 allgather", marks=pytest.mark.faults),
        pytest.param("DP2 distributed optimizer, overlap", marks=pytest.mark.faults),
    ],
)
def test_adapters_train_alike_in_every_layout(layout: str) -> None:
    sizes = LAYOUTS[layout]
    job: dict[str, Any] = {"steps": 4, "lora": TARGETS}
    alone = alone_as(sizes, **job)
    ranks = records(world(sizes), **sizes, **job)
    assert_same_run(ranks, alone)
    assert alone["losses"][-1] < alone["losses"][0] - 0.03
    for record in (alone, *ranks):
        tensors, same = record["frozen"]
        assert tensors > 20
        assert same


@pytest.mark.faults
def test_a_pipeline_stage_without_adapters() -> None:
    """The first four layers are lightning layers: the first rank has nothing to train and passes gradients on to nobody."""
    sizes: dict[str, Any] = {"pipeline": 2, "micro_batch": 1}
    job: dict[str, Any] = {"steps": 3, "lora": ("softmax",)}
    alone, ranks = alone_as(sizes, **job), records(2, **sizes, **job)
    for record in ranks:
        assert worst(record["losses"], alone["losses"]) < LOSS_BOUND
        assert relative(record["grad_norms"], alone["grad_norms"]) < NORM_BOUND
        assert [norms[:7] for norms in record["layer_norms"]] == [[0.0] * 7] * 3
