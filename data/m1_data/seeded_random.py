"""Pseudo-random numbers that are the same on every machine and with every NumPy version.

Everything that samples or shuffles data draws from here. A change of any value would change the order of the training
rows, so ``tests/unit/test_data_seeded_random.py`` pins literal numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from m1_data.arrays import Ints


def derive_seed(*parts: object) -> int:
    """Return a 64-bit seed that is a pure function of ``parts``.

    The seed is the first 8 bytes, little endian, of the SHA-256 of the parts' ``str`` texts joined with the unit
    separator (U+001F). Different purposes get independent seeds when they differ in at least one part.
    """
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "little")


def random_uint64(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """Return ``count`` pseudo-random uint64 numbers, shape ``[count]``, uniform over all 64-bit values.

    Number i is the output of splitmix64 after i + 1 steps from the state ``seed`` (Steele, Lea & Flood 2014, "Fast
    splittable pseudorandom number generators"). ``seed`` is a 64-bit unsigned integer.
    """
    with np.errstate(over="ignore"):
        x = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def permutation(count: int, seed: int) -> Ints:
    """Return a permutation of ``range(count)``, int64 ``[count]``: positions ordered by ``random_uint64``."""
    return np.argsort(random_uint64(count, seed), kind="stable").astype(np.int64)
