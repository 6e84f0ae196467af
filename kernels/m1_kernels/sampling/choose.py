"""The next token of every row: the likeliest, or one uniform number and the inverse of the distribution function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m1_kernels.triton_support import takes_triton


@torch.no_grad()
def choose_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    banned: Tensor,
    lengths: Tensor,
    from_length: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose the next token of every row. On a CUDA device nothing waits for the host.

    A drawn token is the first one, in the order of the vocabulary, up to which the kept probabilities sum to more than
    ``uniform`` of all of them. A row's result does not depend on the other rows.

    Args:
        logits: [rows, vocab] fp32; they may be overwritten.
        temperature: [rows] fp32; 0 takes the likeliest token. Probabilities are the softmax of ``logits / temperature``.
        top_k: [rows] int64: only so many likeliest tokens are kept, with all that tie with the last of them; 0: all.
        top_p: [rows] fp64: of those, only the fewest likeliest that together have this probability, with ties; 1: all.
        uniform: [rows] fp64 in [0, 1).
        banned: [rows, B] int64 tokens that a row must not take where ``lengths`` is less than ``from_length``, [rows] int64 each.
        forced: [rows] int64: the token that a row must take, or -1.

    Returns:
        The tokens [rows] int64, and the logarithm of the softmax of ``logits`` at each of them, [rows] fp32: at temperature 1,
        with all tokens.
    """
    if takes_triton(logits):
        from m1_kernels.sampling.choose_triton import choose_tokens_triton

        return choose_tokens_triton(logits, temperature, top_k, top_p, uniform, banned, lengths, from_length, forced)
    there = logits.gather(1, banned)
    allowed = logits.scatter(1, banned, torch.where((lengths < from_length)[:, None], -math.inf, there))
    token = allowed.argmax(-1)
    if draws := torch.nonzero(temperature > 0)[:, 0].tolist():
        probs = torch.softmax(allowed[draws] / temperature[draws, None], dim=-1).double()
        probs = _filtered(probs, top_k[draws], top_p[draws])
        up_to = probs.cumsum(-1)
        total = up_to[:, -1:]
        target = torch.minimum(uniform[draws, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        token[draws] = torch.searchsorted(up_to, target, right=True)[:, 0]
    token = torch.where(forced >= 0, forced, token)
    return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)


def _filtered(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set the probabilities of the tokens that top-k and top-p leave out to zero, [rows, vocab] fp64."""
    if not (top_k.any() or (top_p < 1).any()):
        return probs
    vocab = probs.shape[1]
    ordered = probs.sort(-1, descending=True).values
    last = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab) - 1
    least = ordered.gather(1, last[:, None])
    ordered = torch.where(ordered >= least, ordered, 0.0)
    up_to = ordered.cumsum(-1)
    kept = (up_to - ordered < top_p[:, None] * up_to[:, -1:]) & (ordered > 0)
    kept[:, 0] = True
    nucleus = torch.where(kept, ordered, math.inf).amin(-1, keepdim=True)
    return torch.where(probs >= torch.where(top_p[:, None] < 1, nucleus, least), probs, 0.0)
