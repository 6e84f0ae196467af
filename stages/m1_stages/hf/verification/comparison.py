"""Compares logits position by position, and tells a difference from a router that was undecided.

A router takes the k likeliest experts. Where the k-th and the next one are equally likely but for rounding, two correct programs
may take different ones, and the logits there, and at later positions that attend to it, differ by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m1_stages.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding may do to a loader's logits."""

    tolerance: float
    """Largest permitted difference of a logit."""
    near_tie: float
    """Router probabilities of the last chosen and the next expert that are closer than this may come in either order."""


FP32 = Rounding(1e-4, 1e-5)
"""fp32 against fp32 or float64; measured differences are near 3e-6."""


def bf16_products(reference: Reference) -> Rounding:
    """Return what rounding does where inputs of products are rounded to bf16: 1 % of the largest logit.

    llama.cpp does so beside bf16 weights. Measured on a tiny trained model: 0.3 %, and near-ties up to 1e-4.
    """
    return Rounding(0.01 * float(reference.logits.abs().max()), 1e-3)


MOST_REROUTED = 0.5
"""Largest permitted share of positions whose difference a near-tie explains: the others prove the export."""
_FEW = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Logits of the trained model for B texts of T tokens, and how decided its routers were."""

    tokens: Tensor
    """[B, T] int64."""
    logits: Tensor
    """[B, T, vocab] fp32 on the CPU."""
    gaps: Tensor
    """[layers, B, T] fp32: probability of the last chosen expert minus that of the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearTie:
    """A position at which a router was undecided."""

    text: int
    position: int
    layer: int
    gap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far the logits of a loader are from those of the trained model."""

    largest: float
    """Largest difference of a logit, over the positions that no near-tie explains."""
    text: int
    position: int
    token: int
    """Where it is: which text, which position in it, which token of the vocabulary."""
    largest_logit: float
    positions: int
    """Positions compared, all texts together."""
    near_ties: tuple[NearTie, ...]
    """Positions at which a router was undecided, the closest first."""
    rerouted: int
    """Positions whose difference is beyond the tolerance, at or after a near-tie of their text."""


def compare(reference: Reference, logits: Tensor, *, rounding: Rounding, loader: str) -> Difference:
    """Compare the logits of a loader with the trained model's.

    Args:
        logits: [B, T, vocab], any float dtype.
        rounding: what is no error.
        loader: who computed them, for messages.

    Raises:
        CheckpointError: they have another shape or are not finite; a position that no near-tie explains differs by more than
            the tolerance; or so many are explained that the rest proves little.
    """
    fix = "do not use this export, and report this with the configuration"
    if logits.shape != reference.logits.shape:
        raise CheckpointError(
            f"{loader} gives logits of shape {tuple(logits.shape)}, the trained model {tuple(reference.logits.shape)}",
            fix=fix,
        )
    largest, token = _largest_differences(reference.logits, logits)
    if not bool(largest.isfinite().all()):
        raise CheckpointError(f"the logits of {loader} are not finite", fix=fix)
    tied = reference.gaps.amin(0) < rounding.near_tie
    explained = (largest > rounding.tolerance) & (tied.cumsum(-1) > 0)
    strict = largest.masked_fill(explained, -1.0)
    text, position = divmod(int(strict.argmax()), strict.shape[1])
    found = Difference(
        largest=float(strict[text, position]),
        text=text,
        position=position,
        token=int(token[text, position]),
        largest_logit=float(reference.logits.abs().max()),
        positions=largest.numel(),
        near_ties=_near_ties(reference.gaps, rounding.near_tie),
        rerouted=int(explained.sum()),
    )
    if found.largest > rounding.tolerance:
        raise CheckpointError(
            f"{loader}'s logits differ from the trained model's by {found.largest:.3g} (largest logit "
            f"{found.largest_logit:.3g}), at position {position} of text {text + 1}, token {found.token}; no router was "
            "undecided there or before",
            fix=fix,
        )
    if found.rerouted > MOST_REROUTED * found.positions:
        raise CheckpointError(
            f"{found.rerouted:,} of {found.positions:,} positions of {loader} differ by more than {rounding.tolerance:g} after "
            f"one of {len(found.near_ties)} near-ties of a router ({describe(found.near_ties)}): too many to prove the export",
            fix="verify an export of a checkpoint that was trained longer: its routers are decided",
        )
    return found


def describe(near_ties: tuple[NearTie, ...]) -> str:
    """Name the closest near-ties in one line."""
    texts = [
        f"position {n.position} of text {n.text + 1}, layer {n.layer}, {n.gap:.1g} apart" for n in near_ties[:_FEW]
    ]
    return "; ".join(texts + [f"and {len(near_ties) - _FEW} more"] * (len(near_ties) > _FEW))


def _largest_differences(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] float64 largest difference over the vocabulary and its token; one text is in memory in float64 at a time."""
    pairs = [(a.double() - b.double()).abs().max(-1) for a, b in zip(reference, logits, strict=True)]
    return torch.stack([p.values for p in pairs]), torch.stack([p.indices for p in pairs])


def _near_ties(gaps: Tensor, near_tie: float) -> tuple[NearTie, ...]:
    """One for every position with a near-tie, at the layer where it is closest."""
    closest, layer = gaps.min(0)
    places = (closest < near_tie).nonzero().tolist()
    ties = [
        NearTie(text=b, position=t, layer=int(layer[b, t]), gap=float(closest[b, t])) for b, t in places
    ]  # fmt: skip
    return tuple(sorted(ties, key=lambda tie: tie.gap))
