"""A random order of any number of things that is computed, not stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shuffled(index: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Send each index below `size` to another: a random permutation that is never stored.

    Four rounds of a Feistel network over the smallest even number of bits that hold
    `size`; what falls outside goes round again until it falls inside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).
    """
    half_bits = max((int(size - 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half_bits) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        value = result[outside]
        left, right = value >> np.uint64(half_bits), value & mask
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        result[outside] = (left << np.uint64(half_bits)) | right
        outside = result >= size
    return result.astype(np.int64)


def mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
