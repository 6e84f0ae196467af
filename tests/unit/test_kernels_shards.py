"""A packed sequence spread over gloo ranks gives each rank its rows of what one process computes, gradients too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from m1_kernels import causal_attention, lightning_attention, lightning_layer
from m1_kernels.lightning.gpu.segments import segment_plan
from m1_kernels.lightning.zigzag import ContextShards, zigzag_shards

HEADS, DIM, TOKENS = 4, 16, 48
LOG_DECAY = torch.tensor([-0.6, -0.05, -1e-4, 0.0])
PACKINGS = ((48,), (12, 36), (11, 37), (13, 35), (1, 22, 2, 23), (24, 24), (6,) * 8, (5, 1, 7, 35))
SEGMENTS = ((700, 2372),)
"""Long enough that the Triton kernels cut a shard's documents into several segments."""


def packings(name: str, world: int) -> tuple[tuple[int, ...], ...]:
    return PACKINGS + SEGMENTS if (name, world) == ("triton", 2) else PACKINGS


def tensors(dtype: torch.dtype, tokens: int = TOKENS) -> list[Tensor]:
    gen = torch.Generator().manual_seed(4)
    return [torch.randn(1, tokens, HEADS, DIM, generator=gen, dtype=torch.float64).to(dtype) for _ in range(4)]


def computed(
    name: str, xs: list[Tensor], weight: Tensor, lengths: tuple[int, ...], shards: ContextShards | None
) -> list[Tensor]:
    """Output and gradients of one function, for ``weight`` as the gradient of the output."""
    documents = {"shards": shards} if shards else {"doc_lengths": lengths}
    xs = [x.clone().requires_grad_() for x in xs]
    if name == "layer":
        x = torch.stack([*xs, xs[0]], 3)
        out = lightning_layer(x, torch.linspace(0.5, 2, HEADS * DIM), LOG_DECAY, eps=0.1, **documents).view(xs[0].shape)
    elif name == "softmax":
        q, k, v = xs
        out = causal_attention(q, k[:, :, ::2], v[:, :, ::2], **documents)
    else:
        out, _ = lightning_attention(*xs, LOG_DECAY.to(xs[0].dtype), backend=name, **documents)
    return [x.detach() for x in (out, *torch.autograd.grad(out, xs, weight))]


def work(rank: int, world: int, folder: str, name: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for n, lengths in enumerate(packings(name, world)):
        shards = zigzag_shards(lengths, dist.group.WORLD)
        if lengths in SEGMENTS:
            local, processors = shards.doc_lengths, 4
            assert len(segment_plan(local, HEADS, processors, torch.device("cpu"), False).segments) > len(local)
        *xs, weight = (
            torch.cat([x.chunk(2 * world, 1)[s] for s in shards.mine], 1) for x in tensors(dtype, sum(lengths))
        )
        torch.save(computed(name, xs, weight, lengths, shards), f"{folder}/{rank}-{n}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        ("chunked", torch.float64, 1e-13),
        ("softmax", torch.float64, 1e-13),
        ("triton", torch.float32, 1e-6),
        ("layer", torch.float32, 1e-6),
    ],
)
def test_ranks_compute_their_rows(tmp_path: Path, world: int, name: str, dtype: torch.dtype, bound: float) -> None:
    mp.start_processes(work, (world, str(tmp_path), name, dtype), nprocs=world, start_method="spawn")
    for n, lengths in enumerate(packings(name, world)):
        *xs, weight = tensors(dtype, sum(lengths))
        want = computed(name, xs, weight, lengths, None)
        ranks = [torch.load(tmp_path / f"{rank}-{n}.pt") for rank in range(world)]
        for part, whole in enumerate(want):
            pairs = [ranks[rank][part].chunk(2, 1) for rank in range(world)]
            got = torch.cat([*(first for first, _ in pairs), *(second for _, second in reversed(pairs))], 1)
            assert float((got - whole).norm() / whole.norm()) < bound, (lengths, part)


def test_tokens_that_do_not_divide_are_refused() -> None:
    class Group:
        size, rank = (lambda self: 4), (lambda self: 0)

    with pytest.raises(ValueError, match="44 tokens do not divide into 8 shards"):
        zigzag_shards((44,), Group())  # type: ignore[arg-type]


def test_states_may_come_in_or_go_out_alone() -> None:
    if not torch.cuda.is_available():
        assert os.environ["TRITON_INTERPRET"] == "1"
    *xs, weight = tensors(torch.float32)
    state = torch.randn(2, HEADS, DIM, DIM)
    for first in (None, state):
        results = []
        for backend in ("triton", "reference"):
            leaves = [x.clone().requires_grad_() for x in xs]
            out, final = lightning_attention(
                *leaves,
                LOG_DECAY,
                doc_lengths=(20, 28),
                initial_state=first,
                output_final_state=first is None,
                backend=backend,
            )
            loss = (out * weight).sum() + (0 if final is None else (final * state).sum())
            results.append([out.detach(), *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-6
