"""One rank of a context-parallel group: documents are changed one at a time, and what changed elsewhere is counted.

A subject takes the inputs of one packed sequence (this rank's tokens) and returns tensors whose
first axis is this rank's tokens: its output, and the gradients of its inputs for a fixed gradient of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from distributed.parity_worker import MODEL
from support.batches import packed_batch
from torch import Tensor

from m1_data.sampling.loader import PackedBatch
from m1_stages.config import ParallelConfig
from m1_stages.decay import released_slopes
from m1_stages.runtime import device, parallel

HEADS, KV_HEADS, DIM = 4, 2, 16
LOG_DECAY = torch.tensor([-0.6, -0.05, -1e-4, 0.0])
Subject = Callable[[list[Tensor], PackedBatch, Any], list[Tensor]]
"""Inputs of this rank's tokens, the rank's batch, the context-parallel group; the last input is the output's gradient."""


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """``context`` ranks, ``subject``, ``packings``; if need be ``backend``, ``poison``, ``mutation``.

    Returns:
        For each packing and each of its documents: ``others``, by result the largest change on this rank of a value that
        belongs to another document, and ``own``, whether the result changed for the document's own tokens here.
    """
    torch.set_num_threads(1)
    dev = device.use("cpu")
    from distributed.mutations import Mutation

    mutation = Mutation(job.get("mutation", ""))
    parallel.start(ParallelConfig(context=job["context"]), device=dev, seed=1)
    try:
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
        subject = {"kernel": _kernel, "layer": _layer, "model": _model}[job["kind"]](job)
        with mutation.applied():
            found = [_changes(subject, tuple(docs), group, job) for docs in job["packings"]]
        assert bool(mutation.calls) == bool(mutation.name)
        return [change for of_packing in found for change in of_packing]
    finally:
        parallel.stop()


def _changes(subject: Subject, docs: tuple[int, ...], group: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    total, ranks, rank = sum(docs), group.size(), group.rank()
    gen = torch.Generator().manual_seed(sum(docs[::2]))
    shape = {"kernel": (total, HEADS, DIM), "layer": (total, 1, MODEL.hidden_size), "model": (total,)}[job["kind"]]
    count = {"kernel": 5, "layer": 2, "model": 2}[job["kind"]]

    def drawn() -> list[Tensor]:
        if job["kind"] == "model":
            return [torch.randint(0, MODEL.vocab_size, shape, generator=gen) for _ in range(count)]
        return [torch.randn(shape, generator=gen) for _ in range(count)]

    def mine(x: Tensor) -> Tensor:
        parts = x.chunk(2 * ranks)
        return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])

    def results(inputs: list[Tensor]) -> list[Tensor]:
        tokens = inputs[0] if job["kind"] == "model" else torch.zeros(total, dtype=torch.int64)
        batch = packed_batch(tokens, docs, loss_mask=torch.ones(total)).zigzag(rank, ranks)
        return subject([mine(x) for x in inputs], batch, group)

    before, other = drawn(), drawn()
    if job.get("poison"):
        other = [torch.full_like(x, float(job["poison"])) for x in other]
    clean = results(before)
    document = mine(torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs)))
    changes = []
    for n, (start, end) in enumerate(pairwise([0, *accumulate(docs)])):
        changed = [x.clone() for x in before]
        for x, y in zip(changed, other, strict=True):
            x[start:end] = y[start:end]
        got = results(changed)
        others = [_largest_change(a[document != n], b[document != n]) for a, b in zip(got, clean, strict=True)]
        own = [not torch.equal(a[document == n], b[document == n]) for a, b in zip(got, clean, strict=True)]
        changes.append(
            {"docs": docs, "document": n, "others": others, "own": own, "tokens": int((document == n).sum())}
        )
    return changes


def _largest_change(a: Tensor, b: Tensor) -> float:
    """Relative to the largest value; 0 when every bit is the same, the sign of a zero included; infinite for NaN."""
    if torch.equal(a.view(torch.int32), b.view(torch.int32)):
        return 0.0
    tiny = torch.finfo(a.dtype).tiny
    change = (a - b).abs().nan_to_num(nan=float("inf")).max() / b.abs().max().clamp(min=tiny)
    return float(change.clamp(min=tiny))


def _kernel(job: dict[str, Any]) -> Subject:
    """q, k, v and gate, and the gradient of the output."""
    from m1_kernels import causal_attention, lightning_attention, lightning_layer
    from m1_stages.model.packed_seq_params import PackedSeqParams

    def run(inputs: list[Tensor], batch: PackedBatch, group: Any) -> list[Tensor]:
        *parts, grad = (x[None] for x in inputs)
        q, k, v, gate = (x.clone().requires_grad_() for x in parts)
        shards = PackedSeqParams.of(batch, group).shards
        wanted = [q, k, v]
        if job["backend"] == "softmax":
            out = causal_attention(q, k[:, :, :KV_HEADS], v[:, :, :KV_HEADS], shards=shards)
        elif job["backend"] == "layer":
            fused = torch.stack([q, k, v, gate], 3)
            weight = torch.linspace(0.5, 2, HEADS * DIM)
            out, wanted = (
                lightning_layer(fused, weight, LOG_DECAY, eps=0.1, shards=shards).view(q.shape),
                [*wanted, gate],
            )
        else:
            out, _ = lightning_attention(q, k, v, LOG_DECAY, backend=job["backend"], shards=shards)
        return [x[0].detach() for x in (out, *torch.autograd.grad(out, wanted, grad))]

    return run


def _built() -> Any:
    from m1_stages.model import build_model

    model = build_model(
        MODEL, parallel=ParallelConfig(context=torch.distributed.get_world_size()), rope_base=1e4, seed=5
    )[0]
    model.set_slopes(released_slopes(MODEL.num_layers, MODEL.num_heads))
    return model


def _layer(job: dict[str, Any]) -> Subject:
    """Hidden states of one attention layer, and the gradient of its output."""
    from m1_stages.model.packed_seq_params import PackedSeqParams

    attention = (
        _built().decoder.layers[{"lightning": 0, "softmax": MODEL.num_layers - 1}[job["attention"]]].self_attention
    )

    def run(inputs: list[Tensor], batch: PackedBatch, group: Any) -> list[Tensor]:
        hidden, grad = inputs
        hidden = hidden.clone().requires_grad_()
        out, _ = attention(hidden, packed_seq_params=PackedSeqParams.of(batch, group))
        return [out.detach(), *torch.autograd.grad(out, hidden, grad)]

    return run


def _model(job: dict[str, Any]) -> Subject:
    """Token ids to logits."""
    model = _built().eval()

    def run(inputs: list[Tensor], batch: PackedBatch, group: Any) -> list[Tensor]:
        with torch.no_grad():
            return [model(batch, logits=True)[0]]

    return run
