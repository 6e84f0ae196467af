"""How the next token is chosen: greedy, or by one uniform number of its own and the inverse of the distribution function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m1_data.seeded_random import derive_seed, random_uint64
from m1_stages.generation.request import Sampling

_GOLDEN = 0x9E3779B97F4A7C15
"""The step of splitmix64, by which ``random_uint64`` counts."""


class Mode(IntEnum):
    """What a batch of rows needs: each mode does all that the ones below it do."""

    GREEDY = 0
    SAMPLED = 1
    FILTERED = 2

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Mode:
        """Return the mode that serves all ``rows``."""
        if any(r.temperature > 0 and (r.top_k or r.top_p < 1) for r in rows):
            return cls.FILTERED
        return cls.SAMPLED if any(r.temperature > 0 for r in rows) else cls.GREEDY


class RowRules(NamedTuple):
    """What the rows of a batch ask for, on the device."""

    temperature: Tensor
    """[rows] fp32."""
    top_k: Tensor
    """[rows] int64."""
    top_p: Tensor
    """[rows] fp64."""
    banned: Tensor
    """[rows, B] int64 ids that must not be chosen before ``from_length``."""
    from_length: Tensor
    """[rows] int64."""


def sequence_seed(seed: int, prompt: Sequence[int] | str, sample: int) -> int:
    """Return the seed of the ``sample``-th answer to a prompt, given by its tokens or by a name of the caller's."""
    name = prompt if isinstance(prompt, str) else np.asarray(prompt, dtype="<i8").tobytes().hex()
    return derive_seed("generation", seed, name, sample)


def uniforms(seed: int, first: int, count: int) -> npt.NDArray[np.float64]:
    """Return numbers ``first`` to ``first + count`` of the sequence of ``seed``: fp64 in [0, 1), multiples of 2^-53.

    Number i is a pure function of ``seed`` and i (splitmix64), so a token depends on nothing else that is random.
    """
    bits = random_uint64(count, (seed + first * _GOLDEN) % 2**64)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose_tokens(
    logits: Tensor, rules: RowRules, lengths: Tensor, uniform: Tensor, forced: Tensor, mode: Mode
) -> tuple[Tensor, Tensor]:
    """Choose the next token of every row. On a CUDA device nothing waits for the host.

    Args:
        logits: [rows, vocab] fp32.
        rules: what each row asks for.
        lengths: [rows] int64: tokens of each row with the chosen one.
        uniform: [rows] fp64 in [0, 1).
        forced: [rows] int64: the token that a row must take, or -1.
        mode: one that serves all rows; a higher one chooses the same tokens.

    Returns:
        The tokens [rows] int64, and the logarithm of the probability that the model gives each of them, [rows] fp32: at
        temperature 1, without top-k, top-p or banned ids.
    """
    ids = rules.banned
    there = logits.gather(1, ids)
    minus = torch.full_like(there, -math.inf)
    allowed = logits.scatter(1, ids, torch.where((lengths < rules.from_length)[:, None], minus, there))
    token = allowed.argmax(-1)
    if mode > Mode.GREEDY:
        greedy = rules.temperature == 0
        probs = torch.softmax(allowed / torch.where(greedy, 1.0, rules.temperature)[:, None], dim=-1).double()
        if mode == Mode.FILTERED:
            probs = _filtered(probs, rules.top_k, rules.top_p)
        up_to = probs.cumsum(-1)
        total = up_to[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(up_to, target, right=True)[:, 0]
        token = torch.where(greedy, token, drawn)
    token = torch.where(forced >= 0, forced, token)
    return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)


def _filtered(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set the probabilities of the tokens that top-k and top-p leave out to zero, [rows, vocab] fp64."""
    vocab = probs.shape[1]
    ordered = probs.sort(-1, descending=True).values
    last = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab) - 1
    least = ordered.gather(1, last[:, None])
    ordered = torch.where(ordered >= least, ordered, 0.0)
    up_to = ordered.cumsum(-1)
    before = up_to - ordered
    kept = (before < top_p[:, None] * up_to[:, -1:]) & (ordered > 0)
    kept[:, 0] = True
    nucleus = torch.where(kept, ordered, math.inf).amin(-1, keepdim=True)
    least = torch.where(top_p[:, None] < 1, nucleus, least)
    return torch.where(probs >= least, probs, 0.0)
