"""Layer inputs in host memory: the same gradients, from the copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m1_kernels import HostInputs, recomputed

LAYERS = 6


def gradients(
    x: Tensor, weights: list[Tensor], host: HostInputs | None, spoil: Callable[[Tensor], None] | None = None
) -> list[Tensor]:
    """Of ``weights`` after a pass through as many layers; ``spoil`` gets every layer's input after its forward."""

    def layer(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda t: t + F.silu(t @ weight)

    if host is not None:
        host.begin()
    for weight in weights:
        before, x = x, recomputed(layer(weight), x, keep_softmax=False, host=host)
        if spoil is not None:
            spoil(before)
    return list(torch.autograd.grad(x.square().mean(), weights))


def parameters(size: int, device: str = "cpu") -> list[Tensor]:
    gen = torch.Generator(device).manual_seed(1)
    return [(0.1 * torch.randn(size, size, generator=gen, device=device)).requires_grad_() for _ in range(LAYERS)]


def test_gradients_come_from_the_copies() -> None:
    weights, x = parameters(8), torch.randn(5, 8)
    want, host = gradients(x, weights, None), HostInputs()

    def spoil(tensor: Tensor) -> None:
        tensor.untyped_storage().fill_(255)

    for _ in range(2):
        got = gradients(x.clone(), weights, host, spoil)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    spoilt = gradients(x.clone(), weights, None, spoil)
    assert not any(torch.equal(a, b) for a, b in zip(want, spoilt, strict=True)), "the test could not fail"


def test_passes_in_flight_do_not_mix() -> None:
    """Two micro-batches go forward before either goes back, as in a pipeline."""
    weights, host = parameters(8), HostInputs()
    inputs = [torch.randn(5, 8), torch.randn(5, 8)]
    want = [gradients(x, weights, None) for x in inputs]
    outs = []
    for x in inputs:
        host.begin()
        for weight in weights:
            x = recomputed(lambda t, w=weight: t + F.silu(t @ w), x, keep_softmax=False, host=host)
        outs.append(x.square().mean())
    for out, expected in zip(outs, want, strict=True):
        got = torch.autograd.grad(out, weights)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_less_memory_and_the_same_bits() -> None:
    """64 MiB an input: six of them wait on the device, or at most two."""
    size, rows = 1024, 16_384
    weights = parameters(size, "cuda")
    x = torch.randn(rows, size, device="cuda")
    gradients(x[:16], weights, HostInputs())  # products claim their workspace
    peaks, results = [], []
    for host in (None, HostInputs()):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = gradients(x, weights, host)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            results.append([grad.cpu() for grad in result])
            del result
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    one = x.numel() * x.element_size()
    assert peaks[1] - peaks[3] > 2.5 * one, [peak / one for peak in peaks]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_are_waited_for() -> None:
    """Layers of a few microseconds: the copies are always late, and the bits are the same nonetheless."""
    weights = parameters(16, "cuda")
    x = torch.randn(1_048_576, 16, device="cuda")
    want, host = gradients(x, weights, None), HostInputs()
    for _ in range(5):
        got = gradients(x, weights, host)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
