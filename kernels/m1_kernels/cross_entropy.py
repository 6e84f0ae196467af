"""Linear cross-entropy with fp32 logits that are never held for all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.autocast import without_autocast


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    valid_vocab: int,
    chunk_tokens: int = 2048,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Per-token ``logsumexp(logits) - logits[label]`` with ``logits = hidden.float() @ weight.float().T``.

    Logits exist for ``chunk_tokens`` tokens at a time; the backward recomputes them.

    Args:
        hidden: [T, h], any floating dtype.
        weight: [V_local, h], this rank's rows of the head.
        labels: [T] int64 in [0, valid_vocab); the loss of any other label is NaN, which no later step can overlook.
        valid_vocab: vocabulary without padding rows; logits of padding rows count as -inf.
        chunk_tokens: tokens whose logits exist together.
        tp_group: ranks that share the vocabulary, in order of their rows; None when ``weight`` is the whole head.

    Returns:
        [T] fp32 (fp64 for fp64 inputs). The gradient of ``hidden`` is this rank's share: the caller sums it over
        the group.

    Raises:
        TypeError: labels are not int64.
        ValueError: shapes or sizes that do not fit.
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}, not int64")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden, weight, labels are {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)}; "
            "want [T, h], [V, h], [T]"
        )
    rows = weight.shape[0] * (dist.get_world_size(tp_group) if tp_group is not None else 1)
    if not 0 < valid_vocab <= rows:
        raise ValueError(f"valid_vocab is {valid_vocab}; the head has {rows} rows")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, not positive")
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, valid_vocab, chunk_tokens, tp_group)
    return loss


def _logits(hidden: Tensor, weight: Tensor, first_row: int, valid_vocab: int) -> Tensor:
    logits = hidden @ weight.T
    padding = first_row + weight.shape[0] - valid_vocab
    if padding > 0:
        logits[:, max(0, weight.shape[0] - padding) :] = float("-inf")
    return logits


def _local_labels(labels: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    local = labels - first_row
    mine = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1), mine


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        valid_vocab: int,
        chunk_tokens: int,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = weight.shape[0]
        first_row = rows * (dist.get_rank(tp_group) if tp_group is not None else 0)
        head = weight.to(dtype)
        log_z, losses = [], []
        for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            logits = _logits(h.to(dtype), head, first_row, valid_vocab)
            top = logits.amax(dim=1)
            if tp_group is not None:
                dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
            local, mine = _local_labels(y, first_row, rows)
            sums = torch.stack(
                [
                    torch.exp(logits - top[:, None]).sum(dim=1),
                    torch.where(mine, logits.gather(1, local[:, None])[:, 0], torch.zeros_like(top)),
                ]
            )
            if tp_group is not None:
                dist.all_reduce(sums, group=tp_group)
            z = top + sums[0].log()
            log_z.append(z)
            known = (y >= 0) & (y < valid_vocab)
            losses.append(torch.where(known, z - sums[1], float("nan")))
        ctx.save_for_backward(hidden, weight, labels, torch.cat(log_z))
        ctx.settings = (valid_vocab, chunk_tokens, first_row)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z = ctx.saved_tensors
        valid_vocab, chunk_tokens, first_row = ctx.settings
        head = weight.to(log_z.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h = hidden[part].to(head.dtype)
            probs = torch.exp(_logits(h, head, first_row, valid_vocab) - log_z[part, None])
            local, mine = _local_labels(labels[part], first_row, weight.shape[0])
            probs.scatter_add_(1, local[:, None], -mine.to(probs.dtype)[:, None])
            probs *= grads[0][part, None]
            grad_hidden[part] = (probs @ head).to(hidden.dtype)
            grad_weight.addmm_(probs.T, h)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
