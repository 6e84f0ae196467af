"""Fused element-wise kernels and the grouped experts: Triton (interpreted on a CPU) and plain PyTorch against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m1_kernels import add_rms_norm, apply_rotary, mix_experts
from m1_kernels.cross_entropy import linear as cross_entropy
from m1_kernels.moe import experts
from m1_kernels.recompute import recomputed

pytest.importorskip("triton")
from m1_kernels.cross_entropy import chunk_triton as gpu_cross_entropy
from m1_kernels.moe.experts_triton import sum_rows_triton, swiglu_backward_triton, swiglu_triton
from m1_kernels.norm.rms_norm_triton import add_rms_norm_triton
from m1_kernels.softmax_attention.rotary_triton import apply_rotary_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def gradients(out: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def near(got: list[Tensor], want: list[Tensor], bound: float = 2e-6) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b.double()).norm() / b.double().norm()) < bound


@pytest.mark.parametrize("channels", [32, 48, 4096, 6144])
@pytest.mark.parametrize("add", [False, True])
def test_add_rms_norm(channels: int, add: bool) -> None:
    rows = 300 if channels < 100 else 5
    x, y, grad = (randn(rows, channels, seed=s).requires_grad_() for s in range(3))
    weight = (1 + randn(channels) / 4).requires_grad_()
    inputs = [x, y, weight] if add else [x, weight]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    s = 1.5 * doubles[0] + 0.7 * doubles[1] if add else doubles[0]
    want = gradients(F.rms_norm(s, (channels,), doubles[-1], 1e-5), grad.double(), *doubles)
    other = y if add else None
    near(gradients(add_rms_norm_triton(x, other, weight, 1.5, 0.7, 1e-5), grad, *inputs), want)
    near(gradients(add_rms_norm(x, other, weight, eps=1e-5, alpha=1.5, beta=0.7), grad, *inputs), want)


@pytest.mark.parametrize(("heads", "dim", "rotary_dim"), [(1, 16, 16), (3, 24, 12), (8, 32, 32)])
def test_rotary_of_strided_heads(heads: int, dim: int, rotary_dim: int) -> None:
    wide = randn(40, heads + 2, dim).requires_grad_()
    positions = torch.arange(40, device=DEVICE) * 1000
    grad = randn(40, heads, dim, seed=1)
    frequencies = 1.0 / 1e4 ** (torch.arange(0, rotary_dim, 2, device=DEVICE, dtype=torch.float32) / rotary_dim)
    got = gradients(apply_rotary_triton(wide[:, :heads], positions, frequencies), grad, wide)
    plain = apply_rotary(wide.cpu()[:, :heads], positions.cpu(), base=1e4, rotary_dim=rotary_dim)
    want = gradients(plain, grad.cpu(), wide)
    near([x.cpu() for x in got], [x.cpu() for x in want], 1e-6)


@pytest.mark.parametrize("inner", [24, 1030])
def test_gated_activation(inner: int) -> None:
    gate_up, weight, grad = randn(7, 2 * inner), randn(7).abs(), randn(7, inner)
    doubles = [t.double().requires_grad_() for t in (gate_up, weight)]
    gate, up = doubles[0].chunk(2, dim=1)
    want = gradients(F.silu(gate) * up * doubles[1][:, None], grad.double(), *doubles)
    near([swiglu_triton(gate_up, weight), *swiglu_backward_triton(gate_up, weight, grad)[1:]], want)
    near([swiglu_backward_triton(gate_up, weight, grad)[0]], want[:1])
    near([experts.swiglu(gate_up, weight), *experts._activate_backward(gate_up, weight, grad)[1:]], want)


def test_sum_of_a_tokens_rows() -> None:
    rows, place = randn(40, 1030), torch.randperm(40).view(20, 2).to(DEVICE)
    out = torch.full((20, 1030), float("nan"), device=DEVICE)
    sum_rows_triton(rows, place, out)
    near([out], [rows[place].sum(1)], 1e-7)


@pytest.mark.parametrize("valid", [1, 700, 5000, 5100, 0])
def test_cross_entropy_passes(valid: int) -> None:
    """Rows are 5,100 wide; what lies beyond ``valid`` is poison."""
    first, rows = 200, 6
    logits = randn(rows, 5100) * 5
    logits[:, valid:] = float("nan")
    labels = torch.tensor([200, 200 + max(valid - 1, 0), 0, 250, 100_000, 201], device=DEVICE)
    got = gpu_cross_entropy.statistics(logits, labels, first, valid)
    want = cross_entropy._statistics(logits.cpu(), labels.cpu(), first, valid)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)
    if valid == 0:
        return
    log_z, grad = got[0] + got[1].log() + 0.5, randn(rows)
    gradient = gpu_cross_entropy.errors(logits, log_z, labels, grad, first, valid, torch.float32)
    expected = cross_entropy._errors(logits.cpu(), log_z.cpu(), labels.cpu(), grad.cpu(), first, valid, torch.float32)
    torch.testing.assert_close(gradient.cpu(), expected, atol=1e-6, rtol=1e-5)
    assert not gradient[:, valid:].any()


def mixture(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Token by token, as the formula reads."""
    out = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[0])
        for slot in range(index.shape[1]):
            e = int(index[token, slot])
            total = total + weights[token, slot] * (w2[e] @ (F.silu(w13[e, 0] @ x[token]) * (w13[e, 1] @ x[token])))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize(("keep", "recompute"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("tile", [7, 30, 64])
def test_mixture_of_experts_in_tiles(tile: int, keep: bool, recompute: bool) -> None:
    """Expert 3 sees no token, one token sees one expert twice as its neighbours do."""
    tokens, hidden, inner, count = 30, 8, 6, 5
    x, w13, w2 = randn(tokens, hidden), randn(count, 2, inner, hidden, seed=1), randn(count, hidden, inner, seed=2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    index[index == 3] = 4
    inputs = [t.double().cpu().requires_grad_() for t in (x, w13, w2, randn(tokens, 2).abs())]
    grad = torch.randn(tokens, hidden, dtype=torch.float64)
    want = gradients(mixture(*inputs, index), grad, *inputs)

    def run(x: Tensor) -> Tensor:
        return mix_experts(x, *inputs[1:], index, keep=keep, tile_tokens=tile)

    out = recomputed(run, inputs[0], keep_softmax=False) if recompute else run(inputs[0])
    near(gradients(out, grad, *inputs), want, 1e-12)


class Calls(TorchDispatchMode):
    """Operators that really ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func)
        return func(*args, **(kwargs or {}))


def test_recomputation_repeats_no_softmax_and_no_expert_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"experts": 0}
    products: Callable[..., Tensor] = experts.expert_product

    def counted(*args: Tensor) -> Tensor:
        calls["experts"] += 1
        return products(*args)

    monkeypatch.setattr(experts, "expert_product", counted)
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    w13, w2 = torch.randn(3, 2, 4, 8), torch.randn(3, 8, 4)
    index = torch.arange(32).remainder(3)[:, None]

    def layer(x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return mix_experts(mixed.view(32, 8), w13, w2, torch.ones(32, 1), index, keep=False)

    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    used = calls["experts"]
    for keep_softmax in (True, False):
        with Calls() as seen:
            again = torch.autograd.grad(recomputed(layer, x, keep_softmax=keep_softmax).sum(), x)[0]
        assert torch.equal(plain, again)
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        assert seen.names.count(forward) == (1 if keep_softmax else 2)
    assert calls["experts"] == 3 * used


def test_padded_lengths_are_few_and_close() -> None:
    from m1_kernels.softmax_attention.attention import CUDNN_LENGTHS_PER_OCTAVE, padded_length

    lengths = [padded_length(n) for n in range(4096, 8193)]
    assert all(n <= padded <= n * (1 + 1 / CUDNN_LENGTHS_PER_OCTAVE) for n, padded in enumerate(lengths, 4096))
    assert len(set(lengths)) == CUDNN_LENGTHS_PER_OCTAVE + 1
    assert [padded_length(n) for n in (1, 31, 4097, 1_048_576, 1_048_575)] == [1, 31, 4352, 1_048_576, 1_048_576]
