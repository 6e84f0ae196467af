"""Linear cross-entropy against torch's in float64, alone and over two processes that share the vocabulary.

The bf16 products of a CUDA device are emulated on the CPU (``on_the_cpu``); the last test runs them, where there is one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from m1_kernels import linear_cross_entropy
from m1_kernels.cross_entropy import linear as cross_entropy

TOKENS, WIDTH, ROWS, VALID = 37, 8, 24, 21


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=gen, dtype=torch.float64).to(dtype)
    weight = torch.randn(ROWS, WIDTH, generator=gen, dtype=torch.float64).to(dtype)
    labels = torch.randint(VALID, (TOKENS,), generator=gen)
    labels[:4] = torch.tensor([0, 11, 12, VALID - 1])
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def expected(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.cross_entropy((hidden.double() @ weight.double().T)[:, :VALID], labels, reduction="none")
    return loss, *torch.autograd.grad((loss * token_weights()).sum(), (hidden, weight))


def token_weights() -> Tensor:
    return torch.linspace(-1, 2, TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 4096])
def test_equals_torch_in_float64(chunk_tokens: int) -> None:
    hidden, weight, labels = inputs(torch.float64)
    loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=VALID, chunk_tokens=chunk_tokens)
    got = (loss, *torch.autograd.grad((loss * token_weights()).sum(), (hidden, weight)))
    for a, b in zip(got, expected(hidden, weight, labels), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert torch.count_nonzero(got[2][VALID:]) == 0


def test_gradcheck() -> None:
    hidden, weight, labels = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, valid_vocab=VALID, chunk_tokens=10), (hidden, weight)
    )


def test_16_bit_inputs_give_fp32_logits_even_under_autocast() -> None:
    """Large logits, which bf16 would round by up to 0.25; gradients differ by a rounding of the result at most."""
    hidden, weight, labels = inputs(torch.bfloat16)
    hidden = (hidden.detach() * 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=VALID)
        grads = torch.autograd.grad((loss * token_weights().float()).sum(), (hidden, weight))
    want, *want_grads = expected(hidden, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, atol=2e-5, rtol=0)
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=2**-7)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Size of the largest tensor any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_logits_of_all_tokens_never_exist_together() -> None:
    hidden = torch.randn(512, 4, requires_grad=True)
    weight = torch.randn(1024, 4, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    with _Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, valid_vocab=1024, chunk_tokens=16).sum().backward()
    assert largest.numel == 16 * 1024


@pytest.mark.parametrize("label", [-100, -1, VALID, ROWS - 1, ROWS + 5])
def test_a_label_outside_the_vocabulary_is_nan_not_a_number(label: int) -> None:
    hidden, weight, labels = inputs(torch.float32)
    labels[5] = label
    loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=VALID)
    assert loss.isnan().nonzero().tolist() == [[5]]


def test_wrong_arguments_are_named() -> None:
    hidden, weight, labels = inputs(torch.float32)
    with pytest.raises(TypeError, match=r"labels is torch\.int32"):
        linear_cross_entropy(hidden, weight, labels.int(), valid_vocab=VALID)
    with pytest.raises(ValueError, match="hidden, weight, labels are"):
        linear_cross_entropy(hidden[1:], weight, labels, valid_vocab=VALID)
    with pytest.raises(ValueError, match="valid_vocab is 25; the head has 24 rows"):
        linear_cross_entropy(hidden, weight, labels, valid_vocab=25)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        linear_cross_entropy(hidden, weight, labels, valid_vocab=VALID, chunk_tokens=0)


def _shard(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    hidden, weight, labels = inputs(torch.float64)
    shard = weight.detach().chunk(2)[rank].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, shard, labels, valid_vocab=VALID, chunk_tokens=10, tp_group=dist.group.WORLD)
    grads = torch.autograd.grad((loss * token_weights()).sum(), (hidden, shard))
    torch.save((loss.detach(), *grads), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_vocabulary(tmp_path: Path) -> None:
    mp.spawn(_shard, (str(tmp_path),), nprocs=2)
    (loss0, hidden0, weight0), (loss1, hidden1, weight1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    loss, grad_hidden, grad_weight = expected(*inputs(torch.float64))
    assert torch.equal(loss0, loss1)
    torch.testing.assert_close(loss0, loss.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(hidden0 + hidden1, grad_hidden, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.cat([weight0, weight1]), grad_weight, atol=1e-12, rtol=1e-12)
    assert float((hidden0 - grad_hidden).abs().max()) > 0.1


def exact_sum_product(a: Tensor, b: Tensor) -> Tensor:
    """What a tensor core computes, up to the order of the sum."""
    assert a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bf16 products of a CUDA device, for bf16 inputs on the CPU."""
    monkeypatch.setattr(cross_entropy, "_product_dtype", lambda hidden, weight: hidden.dtype)
    monkeypatch.setattr(cross_entropy, "_product_fp32", exact_sum_product)
    monkeypatch.setattr(cross_entropy, "_add_product_fp32", lambda total, a, b: total.add_(exact_sum_product(a, b)))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("chunk_tokens", [100, 512])
def test_bf16_products_against_float64(chunk_tokens: int) -> None:
    """Mean-reduced, peaked distributions: the loss is exact, gradients are as near as their roundings to bf16 allow."""
    tokens, width, rows, valid = 512, 128, 1024, 1000
    gen = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, width, generator=gen).bfloat16().requires_grad_()
    weight = (torch.randn(rows, width, generator=gen) / 4).bfloat16().requires_grad_()
    labels = torch.randint(valid, (tokens,), generator=gen)
    labels[:256] = (hidden @ weight.T)[:256, :valid].argmax(1)
    grad = torch.rand(tokens, generator=gen) / tokens
    loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=valid, chunk_tokens=chunk_tokens)
    got = torch.autograd.grad(loss, (hidden, weight), grad)
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = F.cross_entropy((doubles[0] @ doubles[1].T)[:, :valid], labels, reduction="none")
    assert float((loss - exact).detach().abs().max()) < 1e-5
    for a, b in zip(got, torch.autograd.grad(exact, doubles, grad.double()), strict=True):
        assert 1e-3 < float((a.double() - b).norm() / b.norm()) < 4e-3


def test_chunks_follow_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", 600 * 64)
    monkeypatch.setattr(cross_entropy, "FEWEST_TOKENS", 128)
    for rows, tokens in ((64, 512), (1024, 128)):
        with _Largest() as largest:
            linear_cross_entropy(torch.randn(1024, 4), torch.randn(rows, 4), torch.zeros(1024).long(), valid_vocab=rows)
        assert largest.numel == tokens * rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensor_cores_give_fp32_logits_and_two_chunks_of_memory() -> None:
    tokens, width, rows, valid, chunk = 4096, 512, 8192, 8100, 1024
    gen = torch.Generator("cuda").manual_seed(3)
    hidden = torch.randn(tokens, width, generator=gen, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(rows, width, generator=gen, device="cuda") / 8).bfloat16().requires_grad_()
    labels = torch.randint(valid, (tokens,), generator=gen, device="cuda")
    grad = torch.rand(tokens, generator=gen, device="cuda") / tokens
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=valid, chunk_tokens=chunk)
        got = torch.autograd.grad(loss, (hidden, weight), grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = hidden.nbytes + 4 * weight.numel() + weight.nbytes
    products = 2 * chunk * width * (4 + 2)
    assert torch.cuda.max_memory_allocated() - before < 2 * 4 * chunk * rows + gradients + 2 * products + 2**20
    exact = F.cross_entropy((hidden.double() @ weight.double().T)[:, :valid], labels, reduction="none")
    assert float((loss - exact).detach().abs().max()) < 1e-4
    for a, b in zip(got, torch.autograd.grad(exact, (hidden, weight), grad.double()), strict=True):
        assert float((a.double() - b).norm() / b.double().norm()) < 2**-8
