"""Optimizer state and layer inputs in host memory: the same training, bit for bit, and nothing of the model is moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.batches import packed_batch
from torch import Tensor

from m1_stages.config import ModelConfig, OptimConfig, ParallelConfig
from m1_stages.decay import released_slopes
from m1_stages.errors import ConfigError
from m1_stages.model import build_model
from m1_stages.runtime import device, parallel
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.optimizer import Optimizer
from m1_stages.runtime.optimizer.offload import HostState
from m1_stages.training.objective import NextTokenCrossEntropy
from m1_stages.training.step import train_step

SHAPE = ModelConfig(
    hidden_size=32, num_layers=8, num_heads=2, head_dim=16, num_kv_heads=1, rotary_dim=16, num_experts=4,
    expert_hidden_size=32, vocab_size=128,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


def trained(*, offload: bool, distributed: bool, precision: str) -> tuple[list[float], list[Tensor], Any]:
    """Losses of five steps, the model's parameters, and the optimizer."""
    where = device.use("auto")
    model = build_model(
        SHAPE, parallel=ParallelConfig(), precision=precision, rope_base=1e4, device=where.name, seed=7
    )[0]
    model.set_slopes(released_slopes(SHAPE.num_layers, SHAPE.num_heads))
    chunks = TrainableModel([model], ParallelConfig(distributed_optimizer=distributed))
    optimizer = Optimizer(chunks, OptimConfig(), bf16=precision == "bf16", distributed=distributed)
    if offload:
        optimizer.host_state = HostState(optimizer.parts, chunks)
    losses = []
    for step in range(5):
        tokens = torch.randint(0, SHAPE.vocab_size, (96,), generator=torch.Generator().manual_seed(step // 4))
        optimizer.set_learning_rate(1e-2)
        result = train_step(
            chunks, optimizer, [packed_batch(tokens, [60, 36]).to(where.torch_device)], NextTokenCrossEntropy()
        )
        result.apply(max_norm=1.0)
        losses.append(result.loss)
    return losses, list(model.parameters()), optimizer


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_is_the_same(distributed: bool, precision: str) -> None:
    losses, weights, _ = trained(offload=False, distributed=distributed, precision=precision)
    others, moved, optimizer = trained(offload=True, distributed=distributed, precision=precision)
    assert losses == others
    assert losses[3] < losses[0] != losses[4]
    assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))
    state = optimizer.host_state
    assert not state._offloaded, "checkpoints are written from the device"
    before = [tensor.data_ptr() for tensor in state._tensors()]
    values = [tensor.clone() for tensor in state._tensors()]
    count = sum(tensor.numel() for tensor in state._tensors())
    size = sum(weight.numel() for weight in weights)
    assert count == size * (3 if precision == "bf16" else 2), "two moments, and master weights besides bf16 ones"
    places = [weight.data_ptr() for weight in moved]
    state.offload()
    assert all(place != tensor.data_ptr() for place, tensor in zip(before, state._tensors(), strict=True))
    assert places == [weight.data_ptr() for weight in moved], "the model stays"
    state.reload()
    assert all(torch.equal(a, b) for a, b in zip(values, state._tensors(), strict=True))


def test_state_left_away_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: state that is lost on the way changes the losses."""
    losses, _, _ = trained(offload=False, distributed=False, precision="bf16")
    reload = HostState.reload

    def lossy(self: HostState) -> None:
        reload(self)
        for tensor in self._tensors():
            tensor.data.mul_(0.99)

    monkeypatch.setattr(HostState, "reload", lossy)
    assert trained(offload=True, distributed=False, precision="bf16")[0] != losses


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_key_is_refused() -> None:
    model = build_model(SHAPE, parallel=ParallelConfig(), precision="bf16", rope_base=1e4)[0]
    chunks = TrainableModel([model], ParallelConfig())
    with pytest.raises(ConfigError, match="this run has none"):
        Optimizer(chunks, OptimConfig(offload=True), bf16=True, distributed=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_state_leaves_the_device() -> None:
    _, weights, optimizer = trained(offload=True, distributed=False, precision="bf16")
    size = sum(weight.numel() for weight in weights)
    torch.cuda.synchronize()
    here = torch.cuda.memory_allocated()
    optimizer.host_state.offload()
    assert here - torch.cuda.memory_allocated() >= 12 * size
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in optimizer.host_state._tensors())
    optimizer.host_state.reload()
    assert all(tensor.is_cuda for tensor in optimizer.host_state._tensors())
    assert torch.cuda.memory_allocated() >= here


WIDE = replace(SHAPE, hidden_size=512, num_heads=4, head_dim=128, rotary_dim=128, expert_hidden_size=256)


def steps_on_a_gpu(*, offload: bool) -> tuple[list[float], int]:
    """Losses of three recomputed steps of 65,536 tokens, and bytes at the peak above what the steps begin with."""
    chunks = build_model(WIDE, parallel=ParallelConfig(), precision="bf16", rope_base=1e4, device="cuda", seed=7)
    chunks.set_slopes(released_slopes(WIDE.num_layers, WIDE.num_heads))
    chunks.set_recompute(True, offload=offload)
    wrapped = TrainableModel(chunks, ParallelConfig())
    optimizer = Optimizer(wrapped, OptimConfig(), bf16=True, distributed=False)
    tokens = torch.randint(0, WIDE.vocab_size, (65_536,), generator=torch.Generator().manual_seed(3))
    batch = packed_batch(tokens, [2048] * 32).to(torch.device("cuda"))
    losses, before, peak = [], 0, 0
    for step in range(3):
        optimizer.set_learning_rate(1e-3)
        if step == 1:  # moments and workspaces are there
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = train_step(wrapped, optimizer, [batch], NextTokenCrossEntropy())
        if step == 1:
            peak = torch.cuda.max_memory_allocated() - before
        result.apply(max_norm=1.0)
        losses.append(result.loss)
    return losses, peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_inputs_in_host_memory_change_the_peak_alone() -> None:
    """64 MiB an input. The backward pass adds atomically on a GPU, so only the first loss repeats bit for bit."""
    plain, peak = steps_on_a_gpu(offload=False)
    away, lower = steps_on_a_gpu(offload=True)
    assert away[0] == plain[0]
    assert away == pytest.approx(plain, rel=1e-5)
    assert plain[2] < plain[0]
    assert peak - lower > 3 * 65_536 * WIDE.hidden_size * 2, (peak, lower)
