"""Needle documents: keys and their values hidden in a long text, and asked for at its end.

``text [key value] text ... [key value]``: whoever has seen a key finds its value after the second one by looking back, and
nobody can guess it. Keys and values are drawn from the ids of ordinary text, so the task needs neither a tokenizer nor a
language, and lengths are exact. A document is a pure function of haystack, seed, length, depths and sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from m1_data.arrays import Ints
from m1_data.errors import DataError
from m1_data.seeded_random import derive_seed, permutation, random_uint64
from m1_data.spec import SHORTEST_NEEDLE_TOKENS
from m1_data.storage.store import Reader

KEY_TOKENS, VALUE_TOKENS = 4, 4
PAIR_TOKENS = KEY_TOKENS + VALUE_TOKENS
SHORTEST_TOKENS = SHORTEST_NEEDLE_TOKENS
assert SHORTEST_TOKENS == 8 * PAIR_TOKENS
"""Shorter documents would be little but needles."""
_DENSEST, _SPARSEST, _MOST_NEEDLES = 3 * PAIR_TOKENS, 128 * PAIR_TOKENS, 256
"""Tokens for each needle of a training document, and needles at most."""
_ATTEMPTS = 100
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_POOL_TOKENS = 2**22


@dataclass(frozen=True, slots=True)
class Haystack:
    """The text in which needles are hidden."""

    pool: Ints
    """Token ids of ordinary text, back to back."""
    alphabet: Ints
    """Ids of which keys and values are made."""

    @classmethod
    def of_text(cls, readers: Sequence[Reader]) -> Haystack:
        """Make a haystack of the first documents of each shard, at most 4M tokens in all; the alphabet is the ids they use.

        Raises:
            DataError: there is no text.
        """
        parts: list[Ints] = []
        for reader in readers:
            left = _POOL_TOKENS // len(readers)
            for document, length in enumerate(reader.lengths.tolist()):
                parts.append(np.asarray(reader.get(document, 0, min(length - 1, left)), dtype=np.int64))
                left -= len(parts[-1])
                if left <= 0:
                    break
        if not sum(len(part) for part in parts):
            raise DataError("there is no text to hide needles in", fix="prepare sources of text as well")
        pool = np.concatenate(parts)
        return cls(pool, np.unique(pool))

    @classmethod
    def of_random_ids(cls, alphabet: Ints, tokens: int, seed: int) -> Haystack:
        """Make a haystack of ``tokens`` equally likely ids of ``alphabet``, where there is no text."""
        picked = random_uint64(tokens, derive_seed(seed, "random haystack")) % np.uint64(len(alphabet))
        return cls(alphabet[picked.astype(np.int64)], alphabet)

    def span(self, tokens: int, seed: int) -> Ints:
        """Return ``tokens`` ids, int64, from a drawn place on; after the pool's last id comes its first."""
        start = int(random_uint64(1, seed)[0] % np.uint64(len(self.pool)))
        return np.take(self.pool, np.arange(start, start + tokens), mode="wrap")


@dataclass(frozen=True, slots=True)
class NeedleDocument:
    """The token ids of a document and the places to look at."""

    tokens: Ints
    """[length] int64."""
    needles: tuple[int, ...]
    """First token of each hidden key, in the order of ``depths``; empty when nothing is hidden."""
    answers: tuple[int, ...]
    """First token of each value that is asked for, ``VALUE_TOKENS`` long, in the same order."""


def needle_document(
    haystack: Haystack, *, seed: int, length: int, depths: Sequence[float], sample: int, hidden: bool = True
) -> NeedleDocument:
    """Hide one key and value per depth, and ask for all of them at the end, in a drawn order.

    Args:
        length: tokens of the whole document.
        depths: 0 is the beginning of the text, 1 its end, right before the first question.
        sample: another haystack place, other keys and values.
        hidden: False asks without hiding anything, over the same text and with the same answers: what guessing gives.

    Returns:
        A document in which each key and each value occurs exactly twice (once without ``hidden``).

    Raises:
        DataError: too short for that many needles, or ids too few to tell needles from the text.
    """
    needles = len(depths)
    text_tokens = length - PAIR_TOKENS * needles * 2
    if text_tokens < needles:
        raise DataError(
            f"{length} tokens have no room for {needles} needles of {PAIR_TOKENS} tokens and as many questions",
            fix=f"use {SHORTEST_TOKENS} tokens or more a needle",
        )
    text = haystack.span(length - PAIR_TOKENS * needles, derive_seed(seed, "text", length, sample))
    order = permutation(needles, derive_seed(seed, "order", length, sample))
    places = np.rint(np.asarray(depths) * text_tokens).astype(np.int64)
    for attempt in range(_ATTEMPTS):
        numbers = random_uint64(needles * PAIR_TOKENS, derive_seed(seed, "needles", length, sample, attempt))
        picked = (numbers % np.uint64(len(haystack.alphabet))).astype(np.int64)
        pairs = haystack.alphabet[picked].reshape(needles, PAIR_TOKENS)
        document = _assemble(text[:text_tokens], pairs, places, order)
        control = _assemble(text, pairs, places[:0], order)
        words = pairs.reshape(-1, KEY_TOKENS)
        if (_count(document.tokens, words) == 2).all() and (_count(control.tokens, words) == 1).all():
            return document if hidden else control
    raise DataError(
        f"{len(haystack.alphabet)} different ids are too few for {needles} needles in {length} tokens of text",
        fix="prepare more varied text, or a larger vocabulary",
    )


def _assemble(text: Ints, pairs: Ints, places: Ints, order: Ints) -> NeedleDocument:
    parts, at, starts = [], 0, {}
    for nth, needle in enumerate(np.argsort(places, kind="stable").tolist()):
        parts += [text[at : places[needle]], pairs[needle]]
        at = int(places[needle])
        starts[needle] = at + nth * PAIR_TOKENS
    parts += [text[at:], pairs[order].ravel()]
    questions = len(text) + len(starts) * PAIR_TOKENS
    rank = np.argsort(order)
    return NeedleDocument(
        np.concatenate(parts),
        tuple(starts[n] for n in sorted(starts)),
        tuple(questions + int(rank[n]) * PAIR_TOKENS + KEY_TOKENS for n in range(len(pairs))),
    )


def _count(tokens: Ints, words: Ints) -> Ints:
    """Count how often each of ``words`` ``[W, KEY_TOKENS]`` occurs; int64 ``[W]``.

    Equal hashes count as equal words, so a count may be too high, never too low.
    """
    every, wanted = _hash(np.lib.stride_tricks.sliding_window_view(tokens, KEY_TOKENS)), _hash(words)
    names, which = np.unique(wanted, return_inverse=True)
    at = np.minimum(np.searchsorted(names, every), len(names) - 1)
    return np.bincount(at[names[at] == every], minlength=len(names))[which]


def _hash(words: Ints) -> npt.NDArray[np.uint64]:
    total = np.zeros(len(words), dtype=np.uint64)
    for column in range(words.shape[1]):
        total = total * _HASH_FACTOR + words[:, column].astype(np.uint64)
    return total


def training_documents(haystack: Haystack, contexts: Sequence[int], *, seed: int) -> Iterator[Ints]:
    """Yield documents to learn the task from, int64 token ids, without end; each context gets equally many tokens.

    A document is between a sixteenth of its context and all of it, less an end-of-document token. Half of them have a needle for
    every 24 tokens, the others for every 24 to 1,024, 256 at most, at drawn depths; lengths and densities are log-uniform.
    Sparse questions alone, a few in a thousand tokens, teach a small model nothing (docs/length-extension.md).
    """
    tokens = dict.fromkeys(contexts, 0)
    for sample in count():
        context = min(tokens, key=lambda c: (tokens[c], c))
        longest = context - 1
        shortest = min(longest, max(SHORTEST_TOKENS, longest // 16))
        parts = random_uint64(2 + _MOST_NEEDLES, derive_seed(seed, "training", sample)) / 2.0**64
        length = round(shortest * (longest / shortest) ** parts[0])
        spacing = _DENSEST * (_SPARSEST / _DENSEST) ** max(0.0, 2 * parts[1] - 1)
        needles = max(1, min(_MOST_NEEDLES, int(length / spacing)))
        tokens[context] += length
        yield needle_document(
            haystack, seed=seed, length=length, depths=parts[2 : 2 + needles].tolist(), sample=sample
        ).tokens
