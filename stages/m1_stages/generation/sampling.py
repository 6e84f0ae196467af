"""What the rows of a batch ask for, and the uniform number that each token has of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m1_data.seeded_random import derive_seed, random_uint64
from m1_kernels import choose_tokens

_GOLDEN = 0x9E3779B97F4A7C15
"""The step of splitmix64, by which ``random_uint64`` counts."""


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

    def choose(self, logits: Tensor, lengths: Tensor, uniform: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next tokens by ``m1_kernels.choose_tokens``.

        Args:
            logits: [rows, vocab] fp32; they may be overwritten.
            lengths: [rows] int64: tokens of each row with the chosen one.
            uniform: [rows] fp64 in [0, 1).
            forced: [rows] int64: the token that a row must take, or -1.

        Returns:
            The tokens [rows] int64 and their log-probabilities [rows] fp32, as the model gives them.
        """
        return choose_tokens(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            uniform=uniform,
            banned=self.banned,
            lengths=lengths,
            from_length=self.from_length,
            forced=forced,
        )


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
