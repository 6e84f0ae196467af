"""Linear cross-entropy with fp32 logits that are never held for all tokens at once.

bf16 ``hidden`` and ``weight`` on a CUDA device stay bf16: the product of two bf16 numbers is exact in fp32, so a tensor-core
product with fp32 output gives the logits of the upcast product up to the rounding of its sums. The gradient of the logits
is fp32 and goes into its two products as two bf16 parts, which carry it to 2^-17 of each element. Everything else (CPU,
mixed types, fp32, and fp16, whose range cannot hold the gradient of a logit) is upcast and multiplied as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.autocast import without_autocast

LOGITS_AT_ONCE = 2**27
"""Logits of a chunk, if the caller does not choose: 512 MiB, and as much again for what the backward makes of them."""
FEWEST_TOKENS = 1024
"""Per chunk, the backward reads and writes the fp32 gradient of the head, 8 bytes for ``4 * tokens`` operations: with fewer
tokens an H100 (300 operations per byte) would wait for its memory."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    valid_vocab: int,
    chunk_tokens: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Per-token ``logsumexp(logits) - logits[label]`` with ``logits = hidden.float() @ weight.float().T``.

    Logits exist for ``chunk_tokens`` tokens at a time; the backward recomputes them.

    Args:
        hidden: [T, h], any floating dtype.
        weight: [V_local, h], this rank's rows of the head.
        labels: [T] int64 in [0, valid_vocab); the loss of any other label is NaN, which no later step can overlook.
        valid_vocab: vocabulary without padding rows; logits of padding rows count as -inf.
        chunk_tokens: tokens whose logits exist together; the peak is two fp32 [chunk_tokens, V_local]. None: as many as
            1 GiB allows for both, but 1,024 at least (4,096 for 32,000 rows, 5,120 for 25,008, 1,024 for 200,064).
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
    if chunk_tokens is None:
        chunk_tokens = max(FEWEST_TOKENS, LOGITS_AT_ONCE // weight.shape[0] // 256 * 256)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, not positive")
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, valid_vocab, chunk_tokens, tp_group)
    return loss


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype both operands of a product are brought to; bf16 means: products of bf16 numbers, summed in fp32."""
    if hidden.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 else torch.float32


def _product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] @ [k, n], bf16 -> fp32. CUDA only: torch has no such product on the CPU."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _add_product_fp32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add [m, k] @ [k, n], bf16, to ``total``, fp32. CUDA only, torch 2.10 or newer."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _logits(hidden: Tensor, head: Tensor, first_row: int, valid_vocab: int) -> Tensor:
    logits = _product_fp32(hidden, head.T) if head.dtype == torch.bfloat16 else hidden @ head.T
    padding = first_row + head.shape[0] - valid_vocab
    if padding > 0:
        logits[:, max(0, head.shape[0] - padding) :] = float("-inf")
    return logits


def _local_labels(labels: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    local = labels - first_row
    mine = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1), mine


def _log_z_and_target(
    logits: Tensor, labels: Tensor, first_row: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Logsumexp over the group's vocabulary and logit of the label, [c] each. Overwrites ``logits``, to need no second."""
    local, mine = _local_labels(labels, first_row, logits.shape[1])
    sums = logits.new_empty(2, logits.shape[0])
    sums[1] = torch.where(mine, logits.gather(1, local[:, None])[:, 0], 0.0)
    top = logits.amax(dim=1)
    if tp_group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
    torch.sum(logits.sub_(top[:, None]).exp_(), dim=1, out=sums[0])
    if tp_group is not None:
        dist.all_reduce(sums, group=tp_group)
    return top + sums[0].log(), sums[1]


def _gradients(errors: Tensor, grad: Tensor, hidden: Tensor, head: Tensor, grad_weight: Tensor) -> Tensor:
    """Gradient of ``hidden`` [c, h] from ``errors`` (probability - target, [c, V]) and ``grad`` [c]; adds ``grad_weight``.

    bf16 operands: ``d = errors * grad`` is split into ``high = bf16(d)`` and ``low = bf16(high - d)``, ``d ~= high - low``.
    Both parts are written as they are computed, so no fp32 copy of ``d`` is ever read back, and are two halves of one
    tensor, so that each gradient is one product and the sum for the head passes over ``grad_weight`` once.
    """
    tokens, rows = errors.shape
    if head.dtype != torch.bfloat16:
        errors *= grad[:, None]
        grad_weight.addmm_(errors.T, hidden)
        return errors @ head
    parts = torch.empty(2, tokens, rows, dtype=head.dtype, device=head.device)
    torch.mul(errors, grad[:, None], out=parts[0])
    torch.addcmul(parts[0], errors, grad[:, None], value=-1, out=parts[1])
    both = parts.view(2 * tokens, rows)
    _add_product_fp32(grad_weight, both.T, torch.cat([hidden, -hidden]))
    high, low = _product_fp32(both, head).split(tokens)
    return high.sub_(low)


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
        head = weight.to(_product_dtype(hidden, weight))
        first_row = head.shape[0] * (dist.get_rank(tp_group) if tp_group is not None else 0)
        log_z, losses = [], []
        for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            logits = _logits(h.to(head.dtype), head, first_row, valid_vocab)
            z, target = _log_z_and_target(logits, y, first_row, tp_group)
            known = (y >= 0) & (y < valid_vocab)
            log_z.append(z)
            losses.append(torch.where(known, z - target, float("nan")))
        ctx.save_for_backward(hidden, weight, labels, torch.cat(log_z))
        ctx.settings = (valid_vocab, chunk_tokens, first_row)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z = ctx.saved_tensors
        valid_vocab, chunk_tokens, first_row = ctx.settings
        head = weight.to(_product_dtype(hidden, weight))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head, dtype=log_z.dtype)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h = hidden[part].to(head.dtype)
            errors = _logits(h, head, first_row, valid_vocab).sub_(log_z[part, None]).exp_()
            local, mine = _local_labels(labels[part], first_row, head.shape[0])
            errors.scatter_add_(1, local[:, None], -mine.to(errors.dtype)[:, None])
            grad_hidden[part] = _gradients(errors, grads[0][part], h, head, grad_weight)
            del errors  # or it would stand beside the next chunk's logits and parts
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
