"""Which samples are trained, how often in a pass, and which are held out: arithmetic on lengths and counts, no texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from m1_data.arrays import Ints
from m1_data.errors import DataError
from m1_data.seeded_random import derive_seed
from m1_data.sft.store import SampleStore

OverLength = Literal["error", "drop", "truncate"]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What of the samples is trained.

    Args:
        seq_len: tokens of a row.
        seed: decides which samples a fraction of a weight draws.
        over_length: what to do with samples of more than ``seq_len`` tokens; ``truncate`` keeps the beginning.
        max_dropped_share: the share of conversations that may be dropped.
        held_out: share of the conversations that are never trained; their hash decides, so that equal ones stay together.
        weights: by file, how often its conversations are drawn in a pass: 2 twice, 0.5 every second one.
        min_per_1k: matches of patterns in 1,000 trained tokens below which a sample is left out.
        reflection_weight: factor on the weight of samples with at least one match.
    """

    seq_len: int
    seed: int
    over_length: OverLength = "error"
    max_dropped_share: float = 1.0
    held_out: float = 0.0
    weights: tuple[float, ...] = ()
    min_per_1k: float = 0.0
    reflection_weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The samples of a pass."""

    usable: Ints
    """Samples that could be trained, before the selection."""
    drawn: Ints
    """Samples of a pass; one that is drawn more than once is in it as often."""
    held_out: Ints
    lengths: Ints
    """Tokens of every sample of the store, cut to a row."""
    trained: Ints
    """Trained tokens of every sample of the store, of those that are left in a row."""
    counts: Counter[str]


def choose(store: SampleStore, selection: Selection) -> Choice:
    """Return the samples of a pass over a store.

    Raises:
        DataError: a sample that is too long under ``error``, too many that are dropped, or nothing left to train.
    """
    s, counts, seq_len = store.samples, Counter(store.manifest.counts), selection.seq_len
    counts["read"] = sum(file.rows for file in store.manifest.files)
    counts["bad"] = sum(store.manifest.bad_rows.values())
    too_long = s["length"] > seq_len
    if selection.over_length == "error" and too_long.any():
        first = int(np.argmax(too_long))
        raise DataError(
            f"the conversation has {s['length'][first]:,} tokens, a row has {seq_len:,}",
            where=store.where(first),
            fix="set sft.over_length to drop or truncate, or raise sft.context_tokens",
        )
    dropped = too_long if selection.over_length == "drop" else np.zeros(len(s), dtype=bool)
    untrained = ~dropped & (s["first_trained"] >= np.minimum(s["length"], seq_len))
    counts["dropped_over_length"] = int(dropped.sum())
    counts["truncated"] = int((too_long & ~dropped).sum())
    counts["dropped_untrained"] = int(untrained.sum())
    usable = ~dropped & ~untrained
    trained = s["trained"].astype(np.int64)
    for number in np.flatnonzero(usable & too_long).tolist():
        trained[number] = int(store.tokens(number).trained[1:seq_len].sum())
    held_out = usable & _below(s["hash"][:, 0], np.full(len(s), selection.held_out))
    counts["held_out"] = int(held_out.sum())
    usable &= ~held_out
    matches = store.reflection.sum(1, dtype=np.int64)
    kept = usable & (1000 * matches >= selection.min_per_1k * trained)
    counts["left_out"] = int((usable & ~kept).sum())
    times = _times(store, selection, matches) * kept
    _refuse_losses(store, selection, counts, any_left=bool(times.any()))
    return Choice(
        usable=np.flatnonzero(usable),
        drawn=np.repeat(np.arange(len(s)), times),
        held_out=np.flatnonzero(held_out),
        lengths=np.minimum(s["length"], seq_len).astype(np.int64),
        trained=trained,
        counts=counts,
    )


def _times(store: SampleStore, selection: Selection, matches: Ints) -> Ints:
    """How often each sample is drawn in a pass: its weight, whose fraction is drawn or not by the hash of the sample's row."""
    weights = np.array(selection.weights or [1.0] * len(store.manifest.files))[store.samples["file"]]
    weights = weights * np.where(matches > 0, selection.reflection_weight, 1.0)
    drawn = store.samples["hash"][:, 1] ^ np.uint64(derive_seed(selection.seed, "sft weights"))
    return np.floor(weights).astype(np.int64) + _below(drawn, weights % 1.0)


def _below(hashes: npt.NDArray[Any], shares: npt.NDArray[np.float64]) -> Bools:
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53 < shares


def _refuse_losses(store: SampleStore, selection: Selection, counts: Counter[str], *, any_left: bool) -> None:
    dropped = counts["dropped_over_length"] + counts["dropped_untrained"] + counts["bad"]
    most = selection.max_dropped_share
    if any_left and dropped <= most * (counts["samples"] + counts["bad"]):
        return
    longest = int(store.samples["length"].max(initial=0))
    bad_rows = Counter(store.manifest.bad_rows).most_common()
    reasons = {
        "bad": "that are bad rows (" + "; ".join(f"{count:,} {reason}" for reason, count in bad_rows) + ")",
        "dropped_over_length": f"longer than a row of {selection.seq_len:,} tokens (the longest has {longest:,})",
        "dropped_untrained": f"with no answer in the first {selection.seq_len:,} tokens",
        "dropped_held_out": "with a text that is held out to measure on",
        "unwanted": "that ask for no training (weight 0, train false)",
        "held_out": f"held out (sft.held_out is {selection.held_out:g})",
        "left_out": f"with fewer than {selection.min_per_1k:g} matches in 1,000 trained tokens "
        "(sft.reflection_min_per_1k_tokens)",
    }
    raise DataError(
        f"{dropped:,} of {counts['read']:,} conversations would be dropped"
        if any_left
        else f"no conversation of {counts['read']:,} is left to train",
        where=", ".join(file.file for file in store.manifest.files)
        + ": "
        + ", ".join(f"{counts[key]:,} {words}" for key, words in reasons.items() if counts[key]),
        fix=("mend the bad rows" if counts["bad"] else "raise sft.context_tokens")
        + (f", or set sft.max_dropped_share (now {most:g}) if this is wanted" if any_left else ""),
    )
