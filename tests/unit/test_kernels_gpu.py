"""The same kernels on a CUDA device: values, repeatability, no waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import m1_kernels.softmax_attention.attention as softmax_module
from m1_kernels import (
    apply_rotary,
    causal_attention,
    lightning_attention,
    linear_cross_entropy,
    mix_experts,
    recomputed,
)
from m1_kernels.softmax_attention.attention import choose_softmax_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
Attend = Callable[[list[Tensor], str], list[Tensor]]
LENGTHS = (1, 64, 3, 700, 65, 1, 1500)


def inputs(heads: tuple[int, int, int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    gen = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, sum(LENGTHS), n, dim) for n in heads)
    return [torch.randn(s, generator=gen, device="cuda").to(dtype).requires_grad_() for s in shapes]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def edges() -> Tensor:
    return torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()


def lightning(xs: list[Tensor], backend: str) -> list[Tensor]:
    decay = torch.tensor([-0.917, -0.06, -4.9e-5, 0.0], device="cuda")
    out, _ = lightning_attention(*xs, decay, cu_seqlens=edges(), doc_lengths=LENGTHS, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, xs, torch.ones_like(out))]


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 3.2e-3), (torch.float16, 5e-4)])
def test_lightning_equals_the_reference_and_repeats(dtype: torch.dtype, bound: float, backend: str, dim: int) -> None:
    xs = inputs((4, 4, 4), dim, dtype)
    got, again, want = lightning(xs, backend), lightning(xs, backend), lightning(xs, "reference")
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < bound
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def softmax(xs: list[Tensor], backend: str) -> list[Tensor]:
    out = causal_attention(*xs, cu_seqlens=edges(), doc_lengths=LENGTHS, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, xs, torch.ones_like(out))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["varlen", "cudnn"])
def test_softmax_kernels_equal_fp32_per_document(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax_module, "CUDNN_TOKENS", 200)
    xs = inputs((8, 2, 2), 64, dtype)
    assert choose_softmax_backend(xs[0].device, xs[0].dtype, backend).name == backend
    want = softmax([x.detach().float().requires_grad_() for x in xs], "per-document")
    assert max(relative(a, b) for a, b in zip(softmax(xs, backend), want, strict=True)) < 1e-2


@pytest.mark.parametrize("tokens", [4096, 4097, 5000, 8191])
def test_padding_a_document_for_cudnn_changes_nothing(tokens: int) -> None:
    gen = torch.Generator("cuda").manual_seed(0)
    xs = [
        torch.randn(tokens, heads, 64, generator=gen, device="cuda").bfloat16().requires_grad_() for heads in (4, 2, 2)
    ]
    wide = [x.detach().float().requires_grad_() for x in xs]
    upstream = torch.randn(tokens, 4, 64, generator=gen, device="cuda")
    results = []
    for inputs, attend in ((xs, softmax_module._cudnn), (wide, softmax_module._per_document)):
        out = attend(*inputs, (tokens,), 0)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
    assert max(relative(a, b) for a, b in zip(*results, strict=True)) < 1e-2


@pytest.mark.parametrize("attend", ["_varlen", "_cudnn"])
@pytest.mark.parametrize(("lengths", "before"), [((300,), 700), ((5, 400, 9), 1000), ((128, 1), 128)])
def test_keys_before_the_first_query(attend: str, lengths: tuple[int, ...], before: int) -> None:
    """What a context-parallel rank computes: the last tokens of a document whose first are elsewhere."""
    gen = torch.Generator("cuda").manual_seed(0)
    tokens = sum(lengths)
    shapes = (tokens, 8, 64), (tokens + before, 2, 64), (tokens + before, 2, 64)
    xs = [torch.randn(s, generator=gen, device="cuda").bfloat16().requires_grad_() for s in shapes]
    wide = [x.detach().float().requires_grad_() for x in xs]
    results = []
    for inputs, name in ((xs, attend), (wide, "_per_document")):
        out = getattr(softmax_module, name)(*inputs, lengths, before)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert max(relative(a, b) for a, b in zip(*results, strict=True)) < 1e-2


@pytest.mark.parametrize("tile", [1000, 4096])
def test_grouped_experts_in_bf16(tile: int) -> None:
    tokens, hidden, inner, count = 2500, 256, 384, 8
    gen = torch.Generator("cuda").manual_seed(0)
    shapes = (tokens, hidden), (count, 2, inner, hidden), (count, hidden, inner)
    xs = [torch.randn(s, generator=gen, device="cuda").bfloat16() for s in shapes]
    weights = torch.rand(tokens, 2, generator=gen, device="cuda")
    index = torch.stack([torch.randperm(count - 1, generator=gen, device="cuda")[:2] for _ in range(tokens)])
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for keep in (False, True):
            inputs = [*(x.to(dtype).requires_grad_() for x in xs), weights.clone().requires_grad_()]
            out = mix_experts(*inputs, index, keep=keep, tile_tokens=tile)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert max(relative(a, b) for a, b in zip(results[0], results[2], strict=True)) < 1e-2


def test_recomputation_keeps_softmax_on_the_gpu() -> None:
    xs = inputs((8, 2, 2), 64, torch.bfloat16)

    def layer(q: Tensor) -> Tensor:
        return causal_attention(q, *xs[1:], cu_seqlens=edges(), doc_lengths=LENGTHS).sin()

    def kernels(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        with torch.profiler.profile() as profile:
            grad = torch.autograd.grad(run(xs[0]).sum(), xs[0])[0]
            torch.cuda.synchronize()
        names = [e.name.lower() for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return grad, sum(("flash_fwd" in n or "fprop" in n) for n in names)

    plain, once = kernels(layer)
    kept, same = kernels(lambda q: recomputed(layer, q, keep_softmax=True))
    again, twice = kernels(lambda q: recomputed(layer, q, keep_softmax=False))
    assert once > 0
    assert (same, twice) == (once, 2 * once)
    assert relative(kept, plain) < 1e-2
    assert relative(again, plain) < 1e-2


def both_texts(attend: Attend, backend: str, dim: int = 64) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Results for a row, for the same row with another text in document 3, and which tokens are of other documents."""
    xs = inputs((4, 4, 4), dim, torch.bfloat16)
    inside = slice(sum(LENGTHS[:3]), sum(LENGTHS[:4]))
    keep = torch.ones(sum(LENGTHS), dtype=torch.bool, device="cuda")
    keep[inside] = False
    changed = [x.detach().clone() for x in xs]
    for x in changed:
        x[:, inside] = 100.0
    return attend(xs, backend), attend([x.requires_grad_() for x in changed], backend), keep


def assert_isolated(before: list[Tensor], after: list[Tensor], keep: Tensor) -> None:
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, keep], b[:, keep])
        assert not torch.equal(a[:, ~keep], b[:, ~keep])


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_lightning_isolation_bit_for_bit(backend: str, dim: int) -> None:
    assert_isolated(*both_texts(lightning, backend, dim))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("edge", [1, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097])
def test_lightning_isolation_at_every_edge(edge: int, poison: float) -> None:
    lengths = (130, edge, 70)
    gen = torch.Generator("cuda").manual_seed(edge)
    keep = torch.ones(sum(lengths), dtype=torch.bool, device="cuda")
    keep[130 : 130 + edge] = False

    def attend(xs: list[Tensor]) -> list[Tensor]:
        xs = [x.requires_grad_() for x in xs]
        decay = torch.tensor([-0.3, -1e-4], device="cuda")
        out, _ = lightning_attention(*xs, decay, doc_lengths=lengths, backend="triton")
        return [out, *torch.autograd.grad(out, xs, torch.ones_like(out))]

    clean = [torch.randn(1, sum(lengths), 2, 128, generator=gen, device="cuda").bfloat16() for _ in range(3)]
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[:, ~keep] = poison
    assert_isolated(attend(clean), attend(dirty), keep)


def test_lightning_beyond_2_to_31_elements() -> None:
    """64 heads, 300,000 tokens: the last tokens must equal a short run that starts from the state before them."""
    tokens, last, heads = 300_000, 500, 64
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 128, generator=gen, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    decay = -torch.logspace(0, -4, heads, device="cuda")
    out, _ = lightning_attention(q, k, v, decay)
    _, state = lightning_attention(*(x[:, :-last] for x in (q, k, v)), decay, output_final_state=True)
    want, _ = lightning_attention(*(x[:, -last:] for x in (q, k, v)), decay, initial_state=state, backend="reference")
    assert relative(out[:, -last:], want) < 4e-3
    short, _ = lightning_attention(*(x[:, :2000] for x in (q, k, v)), decay, backend="reference")
    assert relative(out[:, :2000], short) < 4e-3


def test_varlen_isolation() -> None:
    """Outputs and gradients of k and v to the bit; flash sums the gradient of q in no fixed order, so to its rounding."""
    before, after, keep = both_texts(softmax, "varlen")
    dq_before, dq_after = before.pop(1), after.pop(1)
    assert_isolated(before, after, keep)
    assert relative(dq_after[:, keep], dq_before[:, keep]) < 1e-2


def test_varlen_isolation_and_repeats_bit_for_bit_when_torch_is_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        before, after, keep = both_texts(softmax, "varlen")
        again, *_ = both_texts(softmax, "varlen")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_isolated(before, after, keep)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


def test_nothing_waits_for_the_device() -> None:
    xs, softmax_xs = inputs((4, 4, 4), 64, torch.bfloat16), inputs((8, 2, 2), 64, torch.bfloat16)
    hidden = torch.randn(64, 32, device="cuda", requires_grad=True)
    weight = torch.randn(100, 32, device="cuda", requires_grad=True)
    labels, positions = torch.arange(64, device="cuda"), torch.arange(sum(LENGTHS), device="cuda")
    cu_seqlens, decay = edges(), -torch.rand(4, device="cuda")

    def everything() -> None:
        out, _ = lightning_attention(*xs, decay, cu_seqlens=cu_seqlens, doc_lengths=LENGTHS)
        out.backward(torch.ones_like(out))
        q, k = (apply_rotary(x, positions, base=1e6, rotary_dim=64) for x in softmax_xs[:2])
        out = causal_attention(q, k, softmax_xs[2], cu_seqlens=cu_seqlens, doc_lengths=LENGTHS)
        out.backward(torch.ones_like(out))
        linear_cross_entropy(hidden, weight, labels, valid_vocab=90, chunk_tokens=20).sum().backward()

    everything()  # builds the layout of this packing
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
