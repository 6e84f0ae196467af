"""Documents packed together and spread over context-parallel ranks: none is reached by another one's tokens.

Each document in turn gets other tokens. Of both attention kinds no bit of another document's output or input gradient may
change; of the whole model no logit, but for what the experts' regrouped sums leave.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from support.ranks import run_on_ranks

SHARD = 8
LOGIT_BOUND = 1e-6
"""Of the largest logit: a few roundings of fp32."""


def packings(ranks: int) -> list[list[int]]:
    """Where documents end relative to the edges between shards, which stand at every ``SHARD`` tokens."""
    shards = 2 * ranks
    return [
        [SHARD] * shards,  # at every edge
        [SHARD - 1, *[SHARD] * (shards - 1), 1],  # one token before
        [SHARD + 1, *[SHARD] * (shards - 2), SHARD - 1],  # one token after
        [SHARD // 2, *[SHARD] * (shards - 1), SHARD // 2],  # inside, each document over one edge
        [3, 2 * SHARD + 4, (shards - 3) * SHARD - 1, 1, 1],  # over several edges; several documents in one shard
    ]


@cache
def changes(ranks: int, which: tuple[int, ...] = (0, 1, 2, 3, 4), **job: Any) -> list[list[dict[str, Any]]]:
    """Of each rank, for every packing and changed document."""
    chosen = [packings(ranks)[n] for n in which]
    return run_on_ranks(ranks, "distributed.isolation_worker:measure", {"context": ranks, "packings": chosen, **job})


ATTENTION: dict[str, dict[str, Any]] = {
    "lightning kernel": {"kind": "kernel", "backend": "chunked"},
    "softmax kernel": {"kind": "kernel", "backend": "softmax"},
    "lightning layer": {"kind": "layer", "attention": "lightning"},
    "softmax layer": {"kind": "layer", "attention": "softmax"},
}
TRITON: dict[str, dict[str, Any]] = {  # one packing each: the interpreter is slow
    "lightning kernel, Triton": {"kind": "kernel", "backend": "triton", "which": (2,)},
    "lightning layer, Triton": {"kind": "kernel", "backend": "layer", "which": (4,)},
}


def assert_isolated(ranks: list[list[dict[str, Any]]], bound: float = 0.0) -> None:
    for rank, found in enumerate(ranks):
        reached = [(rank, change) for change in found if max(change["others"]) > bound]
        assert reached == []


def assert_the_change_was_seen(ranks: list[list[dict[str, Any]]]) -> None:
    """Every result of the changed document's own tokens is another one, wherever it has tokens: the test is not blind."""
    for found in ranks:
        for change in found:
            assert all(change["own"]) == bool(change["tokens"]), change
    for of_document in zip(*ranks, strict=True):
        assert any(change["tokens"] for change in of_document)


def reached(ranks: list[list[dict[str, Any]]], bound: float = 0.0) -> list[bool]:
    """Whether each changed document reached another one, on any rank."""
    return [any(max(change["others"]) > bound for change in one) for one in zip(*ranks, strict=True)]


def test_the_packings_have_the_edges_they_should() -> None:
    for ranks in (2, 4):
        total = 2 * ranks * SHARD
        assert [sum(docs) for docs in packings(ranks)] == [total] * 5
        assert all(min(docs) > 0 for docs in packings(ranks))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("subject", ATTENTION)
def test_attention_of_other_documents_keeps_every_bit(subject: str, ranks: int) -> None:
    found = changes(ranks, **ATTENTION[subject])
    assert_isolated(found)
    assert_the_change_was_seen(found)


@pytest.mark.parametrize("subject", TRITON)
def test_triton_kernels_keep_every_bit(subject: str) -> None:
    pytest.importorskip("triton")
    found = changes(2, **TRITON[subject])
    assert_isolated(found)
    assert_the_change_was_seen(found)


@pytest.mark.parametrize("poison", ["nan", "inf"])
@pytest.mark.parametrize("subject", ["lightning kernel", "softmax kernel"])
def test_a_document_without_finite_values_stays_alone(subject: str, poison: str) -> None:
    """Stronger than other values: whatever multiplies a neighbour by zero is found too."""
    assert_isolated(changes(2, poison=poison, **ATTENTION[subject]))


@pytest.mark.parametrize("ranks", [2, 4])
def test_logits_of_other_documents_stay(ranks: int) -> None:
    found = changes(ranks, kind="model")
    assert_isolated(found, LOGIT_BOUND)
    assert_the_change_was_seen(found)


@pytest.mark.parametrize("subject", ATTENTION)
def test_documents_not_told_apart_are_found(subject: str) -> None:
    """The mutation that the tests above exist for: every document reaches another one, forward or backward."""
    found = changes(2, mutation="documents not told apart", **ATTENTION[subject])
    assert all(reached(found))


def test_documents_not_told_apart_are_found_in_the_logits() -> None:
    """Causal: of all documents but the last."""
    found = changes(2, mutation="documents not told apart", kind="model")
    assert reached(found, LOGIT_BOUND) == [change["document"] < len(change["docs"]) - 1 for change in found[0]]
