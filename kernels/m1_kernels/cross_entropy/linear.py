"""Linear cross-entropy with fp32 logits that are never held for all tokens at once.

bf16 ``hidden`` and ``weight`` on a CUDA device stay bf16: the product of two bf16 numbers is exact in fp32, so a tensor-core
product with fp32 output gives the logits of the upcast product up to the rounding of its sums. The gradient of the logits is
computed in fp32 and rounded once, to bf16, for its two products, like every other gradient that meets a tensor core. All else
(CPU, mixed types, fp32, and fp16, whose range cannot hold the gradient of a logit) is upcast and multiplied as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from m1_kernels.autocast import without_autocast
from m1_kernels.triton_support import takes_triton

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
    """Compute ``logsumexp(logits) - logits[label]`` of every token with ``logits = hidden.float() @ weight.float().T``.

    Logits exist for ``chunk_tokens`` tokens at a time; the backward recomputes them.

    Args:
        hidden: [T, h], any floating dtype.
        weight: [V_local, h], this rank's rows of the head.
        labels: [T] int64 in [0, valid_vocab); the loss of any other label is NaN, which no later step can overlook.
        valid_vocab: vocabulary without padding rows; logits of padding rows count as -inf.
        chunk_tokens: tokens whose logits exist at the same time; the peak is [chunk_tokens, V_local] in fp32 and once in
            the products' dtype. None: as many as 1 GiB allows for both, but 1,024 at least (4,096 for 32,000 rows, 5,120
            for 25,008, 1,024 for 200,064).
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


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return _product_fp32(hidden, head.T) if head.dtype == torch.bfloat16 else hidden @ head.T


def _statistics(logits: Tensor, labels: Tensor, first_row: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest), logit of the label or 0, over the first ``valid`` columns; [c] each."""
    if takes_triton(logits):
        from m1_kernels.cross_entropy.chunk_triton import statistics

        return statistics(logits, labels, first_row, valid)
    local = labels - first_row
    mine = (local >= 0) & (local < valid)
    if valid <= 0:
        nothing = logits.new_zeros(3, logits.shape[0])
        return nothing[0] - float("inf"), nothing[1], nothing[2]
    target = torch.where(mine, logits.gather(1, local.clamp(0, valid - 1)[:, None])[:, 0], 0.0)
    top = logits[:, :valid].amax(dim=1)
    return top, torch.sum((logits[:, :valid] - top[:, None]).exp_(), dim=1), target


def _log_z_and_target(
    logits: Tensor, labels: Tensor, first_row: int, valid: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Logsumexp over the group's vocabulary and logit of the label, [c] each."""
    top, total, target = _statistics(logits, labels, first_row, valid)
    if tp_group is not None:
        own = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
        sums = torch.stack([total * (own - top).exp(), target])
        dist.all_reduce(sums, group=tp_group)
        total, target = sums
    return top + total.log(), target


def _errors(
    logits: Tensor, log_z: Tensor, labels: Tensor, grad: Tensor, first_row: int, valid: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of the logits [c, V]: (softmax - one-hot) * grad, 0 in padding, rounded to ``dtype``."""
    if takes_triton(logits):
        from m1_kernels.cross_entropy.chunk_triton import errors

        return errors(logits, log_z, labels, grad, first_row, valid, dtype)
    local = labels - first_row
    mine = (local >= 0) & (local < valid)
    out = logits.sub_(log_z[:, None]).exp_()
    out[:, max(valid, 0) :] = 0.0
    out.scatter_add_(1, local.clamp(0, out.shape[1] - 1)[:, None], -mine.to(out.dtype)[:, None])
    return out.mul_(grad[:, None]).to(dtype)


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
        valid = min(head.shape[0], valid_vocab - first_row)
        log_z, losses = [], []
        for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            logits = _logits(h.to(head.dtype), head)
            z, target = _log_z_and_target(logits, y, first_row, valid, tp_group)
            del logits  # or it would stand beside the next chunk's
            known = (y >= 0) & (y < valid_vocab)
            log_z.append(z)
            losses.append(torch.where(known, z - target, float("nan")))
        ctx.save_for_backward(hidden, weight, labels, torch.cat(log_z))
        ctx.settings = (chunk_tokens, first_row, valid)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z = ctx.saved_tensors
        chunk_tokens, first_row, valid = ctx.settings
        head = weight.to(_product_dtype(hidden, weight))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head, dtype=log_z.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h, y, grad = hidden[part].to(head.dtype), labels[part], grads[0][part].contiguous()
            logits = _logits(h, head)
            errors = _errors(logits, log_z[part], y, grad, first_row, valid, head.dtype)
            del logits
            grad_hidden[part] = errors @ head
            if grad_weight is None:  # a frozen head
                pass
            elif head.dtype == torch.bfloat16:
                _add_product_fp32(grad_weight, errors.T, h)
            else:
                grad_weight.addmm_(errors.T, h)
            del errors
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None
