"""The objective seam: what a step minimises, and the sums it logs, come from the objective alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.batches import packed_batch
from torch import Tensor, nn

from m1_data.sampling.loader import PackedBatch
from m1_stages.config import ModelConfig, OptimConfig, ParallelConfig
from m1_stages.decay import released_slopes
from m1_stages.model import build_model
from m1_stages.runtime import device, parallel
from m1_stages.runtime.ddp import TrainableModel
from m1_stages.runtime.optimizer import Optimizer
from m1_stages.training.objective import NextTokenCrossEntropy, Objective
from m1_stages.training.step import StepResult, train_step

SHAPE = ModelConfig(
    hidden_size=32, num_layers=8, num_heads=2, head_dim=16, num_kv_heads=1, rotary_dim=16, num_experts=4,
    expert_hidden_size=32, vocab_size=128, aux_loss_coef=0.0,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    parallel.start(ParallelConfig(), device=device.use("auto"), seed=1)
    yield
    parallel.stop()


class Tripled:
    """Three times the cross-entropy, and the sum of its squares for the log."""

    metrics = ("squared", "tokens_again")

    def forward(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        output: Tensor = model(batch)
        return output

    def loss(self, batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = batch.loss_mask.view(-1)
        per_token = output.view(-1) * mask
        loss, tokens = 3.0 * per_token.sum(), mask.sum()
        sums = [loss.detach(), tokens, per_token.detach().square().sum(), tokens]
        return loss, tokens.to(torch.int), torch.stack([value.double() for value in sums])


def step(objective: Objective) -> StepResult:
    """One step over two micro-batches, from the same weights each time."""
    where = device.use("auto")
    model = build_model(SHAPE, parallel=ParallelConfig(), rope_base=1e4, device=where.name, seed=7)
    model.set_slopes(released_slopes(SHAPE.num_layers, SHAPE.num_heads))
    trainable = TrainableModel(model, ParallelConfig())
    optimizer = Optimizer(trainable, OptimConfig(), bf16=False, distributed=False)
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 96), generator=torch.Generator().manual_seed(3))
    batches = [packed_batch(row, [60, 36]).to(where.torch_device) for row in tokens]
    return train_step(trainable, optimizer, batches, objective)


def per_token_losses() -> Tensor:
    seen: list[Tensor] = []

    class Watching(NextTokenCrossEntropy):
        def loss(self, batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            seen.append(output.detach().view(-1)[batch.loss_mask.view(-1) > 0])
            return super().loss(batch, output)

    step(Watching())
    return torch.cat(seen).double()


def test_another_objective_is_what_the_step_minimises() -> None:
    plain, tripled = step(NextTokenCrossEntropy()), step(Tripled())
    assert plain.metrics == {}
    assert tripled.loss == pytest.approx(3.0 * plain.loss, rel=1e-6)
    assert tripled.grad_norm == pytest.approx(3.0 * plain.grad_norm, rel=1e-5)
    assert tripled.layer_grad_norms == pytest.approx([3.0 * norm for norm in plain.layer_grad_norms], rel=1e-4)


def test_its_own_sums_are_logged_per_trained_token() -> None:
    losses = per_token_losses()
    result = step(Tripled())
    assert result.trained_tokens == len(losses) == 2 * (96 - 2)
    assert result.metrics["squared"] == pytest.approx(float(losses.square().mean()), rel=1e-6)
    assert result.metrics["tokens_again"] == 1.0
    assert step(NextTokenCrossEntropy()).loss == pytest.approx(float(losses.mean()), rel=1e-6)


def test_matrices_decay_and_vectors_do_not() -> None:
    """Megatron leaves the weight decay of each group to a scheduler that we do not use: every group would get the same."""
    where = device.use("auto")
    model = build_model(SHAPE, parallel=ParallelConfig(), rope_base=1e4, device=where.name, seed=7)
    trainable = TrainableModel(model, ParallelConfig())
    optimizer = Optimizer(trainable, OptimConfig(weight_decay=0.5), bf16=False, distributed=False)
    before = {name: weight.detach().clone() for name, weight in trainable[0].named_parameters()}
    optimizer.begin_step()
    optimizer.prepare_gradients()
    optimizer.set_learning_rate(0.1)
    optimizer.apply_gradients(scale=1.0)
    vectors = 0
    for name, weight in trainable[0].named_parameters():
        factor = 1.0 if weight.dim() == 1 else 1 - 0.1 * 0.5
        torch.testing.assert_close(weight.detach(), factor * before[name], msg=name)
        vectors += weight.dim() == 1
    assert 0 < vectors < len(before)
