"""The seam between the training step and what it minimises.

``train_step`` knows an objective by two calls: a forward pass over a micro-batch, and the sums that its output is reduced to.
To train for something else, write a class with the members of ``Objective`` and hand it to ``train_stage``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from m1_data.sampling.loader import PackedBatch


class Objective(Protocol):
    """An objective defines what a step minimises, one micro-batch at a time."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the sums that ``loss`` logs besides the loss and the number of trained tokens."""
        ...

    def forward(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Run a chunk of the model over this rank's part of ``batch``.

        Returns:
            In the last chunk of a pipeline what ``loss`` takes; in all others the hidden states, as the model gives them.
        """
        ...

    def loss(self, batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce the output of the last chunk to sums over this rank's trained tokens.

        Returns:
            The loss, a scalar that gradients flow from: a sum, which the step divides by the trained tokens of the whole
            global batch; the number of trained tokens, an int32 scalar; and [2 + len(metrics)] fp64 sums for the log: loss,
            tokens, then the ``metrics``.
        """
        ...


class NextTokenCrossEntropy:
    """Cross-entropy of the next token, summed over the tokens of ``loss_mask``: pretraining and fine-tuning."""

    metrics: tuple[str, ...] = ()

    def forward(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Per-token loss [1, T] fp32 of this rank's tokens, nats."""
        output: Tensor = model(batch)
        return output

    def loss(self, batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the masked per-token losses; see ``Objective.loss``."""
        mask = batch.loss_mask.view(-1)
        loss = (output.view(-1) * mask).sum()
        tokens = mask.sum()
        logged = torch.stack([loss.detach().double(), tokens.double()])
        return loss, tokens.to(torch.int), logged
