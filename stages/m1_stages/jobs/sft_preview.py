"""``m1 sft --dry-run``: what fine-tuning would train, without a model. No torch; nothing is written into the run directory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m1_data.sampling.packing import best_fit
from m1_data.sft.choice import choose
from m1_data.sft.preview import Preview, PreviewSpan
from m1_data.sft.stats import SFTStats, count
from m1_stages.config import Resolved
from m1_stages.jobs.prepared import open_tokenizer
from m1_stages.jobs.sft_data import opened_for_preview, sample_settings, selection


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewSample:
    """A sample as a person reads it."""

    where: str
    domain: str
    tokens: int
    spans: list[PreviewSpan]


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBucket:
    """Samples of a pass with ``first`` to ``last`` tokens."""

    first: int
    last: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SftPreview:
    """What a pass of fine-tuning holds."""

    stats: SFTStats
    seq_len: int
    samples: list[PreviewSample]
    lengths: list[LengthBucket]


def preview(resolved: Resolved, *, samples: int) -> SftPreview:
    """Read, encode, choose and pack the configured conversations.

    Args:
        samples: number of samples to show, evenly spaced over a pass.

    Raises:
        M1Error: no conversations, a broken line, no prepared data, or nothing left to train.
    """
    manifest, chosen = open_tokenizer(resolved), selection(resolved)
    with opened_for_preview(resolved, manifest) as store:
        choice = choose(store, chosen)
        lengths = choice.lengths[choice.drawn]
        rows = best_fit(lengths, chosen.seq_len)[1]
        distinct = np.unique(choice.drawn)
        shown = distinct[np.unique(np.linspace(0, len(distinct) - 1, min(samples, len(distinct))).astype(int))]
        text = Preview(store, sample_settings(resolved, manifest).tokenizer_dir)
        return SftPreview(
            stats=count(store, choice, rows=rows, seq_len=chosen.seq_len, weights=chosen.weights),
            seq_len=chosen.seq_len,
            samples=[
                PreviewSample(
                    where=store.where(number),
                    domain=store.manifest.domains[int(store.samples["domain"][number])],
                    tokens=int(choice.lengths[number]),
                    spans=text.spans(number, chosen.seq_len),
                )
                for number in shown.tolist()
            ],
            lengths=_histogram(lengths.tolist()),
        )


def _histogram(lengths: list[int]) -> list[LengthBucket]:
    """Buckets whose borders are powers of two, from the first to the last that holds a sample."""
    powers = [length.bit_length() for length in lengths]
    return [
        LengthBucket(first=1 << (power - 1), last=(1 << power) - 1, samples=powers.count(power))
        for power in range(min(powers), max(powers) + 1)
    ]
