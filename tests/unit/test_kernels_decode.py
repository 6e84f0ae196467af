"""Kernels of a decoding step that do the work of several: through Triton's interpreter on a CPU, against PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from m1_kernels import (
    add_rms_norm,
    apply_rotary,
    begin_step,
    end_step,
    mix_and_norm,
    mix_experts,
    norm_and_route,
    rotary_frequencies,
    rotate_into_cache,
)
from m1_kernels.decode import bookkeeping_triton, post_norm_triton
from m1_kernels.moe import decode_triton as few
from m1_kernels.overlap import overlap
from m1_kernels.softmax_attention import rotary_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, ALPHA, BETA = 1e-2, 1.5, 0.7


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("width", "experts", "k"), [(48, 5, 2), (300, 40, 3)])
def test_a_norm_and_the_router_behind_it(width: int, experts: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_norm_triton, "ROUTER_ELEMENTS", 64 * 64)  # the wider one in several parts
    x, y, weight, router = random(7, width), random(7, width, seed=1), random(width), random(experts, width)
    norm = add_rms_norm(x, y, weight, eps=EPS, alpha=ALPHA, beta=BETA).double()
    probs = torch.softmax(norm @ router.double().T, -1)
    top, index = probs.topk(k)
    fused = post_norm_triton.norm_and_route_triton(x, y, weight, router, k, ALPHA, BETA, EPS)
    plain = norm_and_route(x, y, weight, router, k, eps=EPS, alpha=ALPHA, beta=BETA)
    for n, weights, chosen in (fused, plain):
        assert largest(n.double(), norm) < 1e-6
        assert torch.equal(chosen, index)
        assert largest(weights.double(), top / top.sum(1, keepdim=True)) < 1e-5


def test_a_router_reads_the_norm_as_it_was_rounded() -> None:
    """In fp16, which the interpreter computes like bf16 on a GPU: a product of what was not rounded is another one."""
    x, y, weight, router = (
        t.half() for t in (random(9, 256), random(9, 256, seed=1), random(256), random(4, 256) / 16)
    )
    n, weights, chosen = post_norm_triton.norm_and_route_triton(x, y, weight, router, 4, ALPHA, BETA, EPS)
    assert torch.equal(n, add_rms_norm(x, y, weight, eps=EPS, alpha=ALPHA, beta=BETA))
    probs = torch.softmax(n.double() @ router.double().T, -1)
    assert largest(weights.double(), probs.gather(1, chosen)) < 1e-5


@pytest.mark.parametrize("tokens", [3, 40])
def test_experts_and_the_norm_behind_them(tokens: int) -> None:
    experts, width, inner = 5, 40, 24
    x, w13, w2 = random(tokens, width), random(experts, 2, inner, width), random(experts, width, inner)
    weight, weights = random(width), torch.rand(tokens, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    # As many slots of an expert as a program takes, none, more than twice and more than once as many.
    index = torch.tensor([[0, 2]] * few.FEW + [[2, 3]] * 24, device=DEVICE)[:tokens]
    mixed = mix_experts(x, w13, w2, weights, index, keep=False)
    expected = add_rms_norm(x, mixed, weight, eps=EPS, alpha=ALPHA, beta=BETA)
    rows = few.expert_rows_triton(x, w13, w2, weights, index, 0)
    assert largest(rows.sum(1), mixed) < 1e-5
    assert largest(post_norm_triton.sum_and_norm_triton(rows, x, weight, ALPHA, BETA, EPS), expected) < 1e-5
    more: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "beta": BETA}
    for add_up, scale in ((None, 1.0), (lambda share: share * 2, 2.0)):
        plain = mix_and_norm(x, w13, w2, weights, index, weight, first=0, num_experts=experts, add_up=add_up, **more)
        assert largest(plain, add_rms_norm(x, mixed * scale, weight, eps=EPS, alpha=ALPHA, beta=BETA)) < 1e-5


@pytest.mark.parametrize(("kv", "group", "dim", "rotary_dim"), [(1, 3, 24, 24), (2, 2, 20, 12)])
def test_queries_are_rotated_and_keys_and_values_written(kv: int, group: int, dim: int, rotary_dim: int) -> None:
    slots, capacity = 4, 6
    x = random(slots, kv, group + 2, dim)
    positions, rows = torch.tensor([0, 3, 70000, 5], device=DEVICE), torch.tensor([0, 3, 5, 5], device=DEVICE)
    turned = apply_rotary(x.flatten(1, 2), positions, base=1e4, rotary_dim=rotary_dim).view(x.shape)
    frequencies = rotary_frequencies(1e4, rotary_dim, x.device)
    for function in (rotary_triton.rotate_into_cache_triton, rotate_into_cache):
        cache = torch.full((2, slots, capacity, kv, dim), 9.0, device=DEVICE)
        q = function(x, positions, rows, frequencies, *cache)
        assert largest(q, turned[:, :, :group].flatten(1, 2)) < 1e-6
        slot = torch.arange(slots, device=DEVICE)
        assert largest(cache[0, slot, rows], turned[:, :, group]) < 1e-6
        assert torch.equal(cache[1, slot, rows], x[:, :, group + 1])
        cache[:, slot, rows] = 9.0
        assert bool((cache == 9.0).all()), "nothing else is written"


def test_bookkeeping_of_a_step() -> None:
    capacity, at = 9, torch.tensor([1])
    positions, active = torch.tensor([0, 4, 8, 7, 5]), torch.tensor([1, 0, 1, 1, 1])
    uniform = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forced = torch.arange(15).view(3, 5) - 1
    on = [x.to(DEVICE) for x in (positions, active, at, uniform, forced)]
    for found in (bookkeeping_triton.begin_step_triton(*on, capacity), begin_step(*on, capacity=capacity)):
        rows, seen, lengths, mine, my_forced = (x.cpu() for x in found)
        assert rows.tolist() == [0, 8, 8, 7, 5]
        assert seen.tolist() == [1, 1, 9, 8, 6]
        assert lengths.tolist() == [2, 6, 10, 9, 7]
        assert torch.equal(mine, uniform[1])
        assert my_forced.tolist() == [4, 5, 6, 7, 8]
    chosen, logprob = torch.tensor([3, 1, 4, 1, 5], device=DEVICE), -torch.arange(5, device=DEVICE).float()
    for triton in (True, False):
        token, before, counter = chosen * 0, on[0].clone(), on[2].clone()
        tokens, logprobs = torch.full((3, 5), -7, device=DEVICE), torch.ones(3, 5, device=DEVICE)
        if triton:
            bookkeeping_triton.end_step_triton(
                chosen, logprob, token, tokens, logprobs, before, on[1], counter, capacity
            )
        else:
            end_step(
                chosen, logprob, token=token, tokens=tokens, logprobs=logprobs, positions=before, active=on[1], at=counter,
                capacity=capacity,
            )  # fmt: skip
        assert token.tolist() == [3, 1, 4, 1, 5]
        assert tokens.tolist() == [[-7] * 5, [3, 1, 4, 1, 5], [-7] * 5]
        assert logprobs.tolist() == [[1.0] * 5, [0, -1, -2, -3, -4], [1.0] * 5]
        assert before.tolist() == [1, 4, 8, 8, 6]
        assert counter.tolist() == [2]


def test_kernels_overlap_on_a_device_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overlap.__wrapped__(torch.device("cpu")) == {"OVERLAP": False}
    for capability, expected in (((9, 0), True), ((10, 0), True), ((8, 9), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        options = overlap.__wrapped__(torch.device("cuda"))
        assert options == ({"OVERLAP": True, "launch_pdl": True} if expected else {"OVERLAP": False})


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter tells the addresses")
def test_the_first_bytes_of_the_probable_expert_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, width, inner, k = 3, 40, 24, 2
    w13, w2 = random(experts, 2, inner, width), random(experts, width, inner)
    addresses: list[int] = []
    monkeypatch.setattr(few, "prefetch", lambda address: addresses.extend(address.handle.data.flatten().tolist()))
    monkeypatch.setattr(few, "overlap", lambda _: {"OVERLAP": True})
    for name in ("wait_for_previous", "start_next"):
        monkeypatch.setattr(few, name, lambda *_, **__: None)
    monkeypatch.setattr(few, "AHEAD", 64)
    few.expert_rows_triton(random(2, width), w13, w2, torch.ones(2, k), torch.tensor([[0, 2], [1, 2]]), 0)
    assert set(addresses) == {
        row.data_ptr() + at for matrix in (w13, w2) for row in matrix.flatten(0, -2) for at in (0, 32)
    }
