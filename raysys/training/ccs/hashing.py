"""Keyed hashes and order-preserving keys: what makes a selection independent of the row order.

"The q smallest hashes" is a mergeable summary, which a random permutation is not: each partition
keeps its own q smallest, and merging the lists is exact (a choice of ours; the CCS paper, Zheng et
al., ICLR 2023, samples with the global random generator).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SIGN = np.uint64(1 << 63)


def mix64(values: U64) -> U64:
    """SplitMix64 (Steele et al., OOPSLA 2014): a bijection on 64-bit words, element by element."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: U64 = z ^ (z >> np.uint64(31))
    return mixed


def keyed_hash(ids: NDArray[np.int64], seed: int) -> U64:
    """Hash of each id under a seed, uint64: ``mix64(id xor mix64(seed))``.

    A bijection of the id for every seed, so distinct ids never tie.
    """
    key = mix64(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))[0]
    return mix64(ids.astype(np.uint64) ^ key)


def descending_key(values: NDArray[np.float64]) -> U64:
    """Map finite floats to uint64 so that a larger value has a smaller key; -0.0 equals 0.0."""
    bits = (values + 0.0).view(np.uint64)
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    descending: U64 = ~ascending
    return descending


def multiset_digest(ids: NDArray[np.int64], labels: NDArray[np.int64] | None) -> int:
    """Order-free 64-bit digest of (id, label) pairs; digests of disjoint parts add modulo 2**64."""
    words = mix64(ids.astype(np.uint64))
    if labels is not None:
        words = mix64(words ^ mix64(labels.astype(np.uint64) + np.uint64(1)))
    return int(np.add.reduce(words, dtype=np.uint64)) if len(words) else 0
