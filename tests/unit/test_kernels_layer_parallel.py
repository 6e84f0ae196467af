"""The fused lightning layer over two processes that share the heads: against one process, and against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from m1_kernels import lightning_attention, lightning_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without one, children inherit TRITON_INTERPRET from conftest
LENGTHS, HEADS, DIM = (17, 1, 23), 4, 16
EPS = 0.3  # tokens' mean squares go from 0.07 to 28, so that it counts
BOUND = 5e-6  # the interpreter's errors are 5e-7 at most; without an all_reduce they are over 1e-2
NAMES = ("y", "dq", "dk", "dv", "dgate", "dweight")


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, log_decay and the gradient of y, of all heads; decays differ, and so do the halves' sums of squares."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, sum(LENGTHS), HEADS, 4, DIM, generator=gen)
    grad = torch.randn(1, sum(LENGTHS), HEADS * DIM, generator=gen)
    decay = -torch.tensor([0.9, 0.1, 4.9e-5, 0.0])
    weight = torch.linspace(0.5, 2, HEADS * DIM)
    return x.to(DEVICE), weight.to(DEVICE), decay.to(DEVICE), grad.to(DEVICE)


def eager_layer(x: Tensor, weight: Tensor, decay: Tensor) -> Tensor:
    q, k, v, gate = x.unbind(3)
    out, _ = lightning_attention(F.silu(q), F.silu(k), F.silu(v), decay, doc_lengths=LENGTHS, backend="reference")
    flat = out.flatten(2)
    return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS) * weight * torch.sigmoid(gate.flatten(2))


def parts(y: Tensor, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """What ``NAMES`` lists; each with the heads' channels last, so that ranks concatenate there."""
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    return [t.detach().cpu() for t in (y, *(part.flatten(2) for part in dx.unbind(3)), dweight)]


def fused(heads: slice, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    x, weight, decay, grad = inputs()
    channels = slice(heads.start * DIM, heads.stop * DIM)
    x, weight = (t.clone().requires_grad_() for t in (x[:, :, heads], weight[channels]))
    y = lightning_layer(x, weight, decay[heads], eps=EPS, doc_lengths=LENGTHS, tp_group=tp_group)
    return parts(y, x, weight, grad[..., channels])


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = HEADS // 2
    torch.save(fused(slice(rank * half, (rank + 1) * half), dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_two_processes_share_the_heads(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    one = fused(slice(0, HEADS), None)
    x, weight, decay, grad = (t.double() for t in inputs())
    x, weight = x.requires_grad_(), weight.requires_grad_()
    exact = parts(eager_layer(x, weight, decay), x, weight, grad)
    for wanted in (one, exact):
        errors = {
            f"{name} of rank {rank}": relative(got, want.chunk(2, -1)[rank])
            for rank in range(2)
            for name, got, want in zip(NAMES, ranks[rank], wanted, strict=True)
        }
        assert {where: error for where, error in errors.items() if not error < BOUND} == {}
