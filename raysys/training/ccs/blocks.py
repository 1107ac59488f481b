"""What the selection asks of each block of rows: small, mergeable answers.

A pass is a frozen, picklable callable from a :class:`Block` to an answer; answers of any partition
of the rows merge to the same value (sums, minima, bottom-q lists), which makes the coreset bit
for bit identical for any number of partitions, workers and row orders.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError
from raysys.training.ccs.hashing import descending_key, keyed_hash, multiset_digest
from raysys.training.ccs.strata import Strata
from raysys.training.ccs.table import check_finite, check_ids

DIGIT_BITS = 16
DIGITS_PER_WORD = 4
RANK_BITS = 12  # second digit of a quantile: 28 bits of the key, a relative 2**-16
ALL_ONES = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some rows: ids int64, score and hardness float64, labels int64 or None; equal lengths."""

    ids: NDArray[np.int64]
    score: NDArray[np.float64]
    hardness: NDArray[np.float64]
    labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.score), len(self.hardness)}
        if self.labels is not None:
            lengths.add(len(self.labels))
        if len(lengths) != 1:
            raise ConfigError("block", sorted(lengths), "columns of one length")

    def where(self, mask: NDArray[np.bool_]) -> Block:
        labels = None if self.labels is None else self.labels[mask]
        return Block(self.ids[mask], self.score[mask], self.hardness[mask], labels)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """First answer: counts, digest, class counts, ids, and the first digit of the hardness."""

    rows: int
    digest: int
    classes: NDArray[np.int64]
    digits: NDArray[np.int64]
    ids: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class SurveyPass:
    """Validate a block and describe it (ids come along for the test of uniqueness)."""

    grouped: bool

    def __call__(self, block: Block) -> Survey:
        check_ids(block.ids, unique=False)
        check_finite("score", block.ids, block.score)
        check_finite("hardness", block.ids, block.hardness)
        if self.grouped and block.labels is None:
            raise ConfigError("labels", None, "class labels, needed by class_balanced")
        labels = block.labels if block.labels is not None else np.zeros(0, np.int64)
        if len(labels) and int(labels.min()) < 0:
            raise ConfigError("labels", int(labels.min()), "class indices >= 0")
        keys = descending_key(block.hardness)
        return Survey(
            len(block.ids),
            multiset_digest(block.ids, block.labels),
            np.bincount(labels),
            _digit_counts(keys >> np.uint64(64 - DIGIT_BITS)),
            block.ids,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A place in the order (hardness descending, id ascending): the last example that is cut."""

    key: int = -1
    id: int = -1

    def keeps(self, block: Block) -> NDArray[np.bool_]:
        """Mask of the survivors."""
        if self.key < 0:
            return np.ones(len(block.ids), np.bool_)
        keys = descending_key(block.hardness)
        edge = np.uint64(self.key)
        kept: NDArray[np.bool_] = (keys > edge) | ((keys == edge) & (block.ids > self.id))
        return kept


@dataclasses.dataclass(frozen=True, slots=True)
class DigitPass:
    """Histogram of one 16-bit digit of (key, id) among the rows whose earlier digits match."""

    prefix: tuple[int, ...]

    def __call__(self, block: Block) -> NDArray[np.int64]:
        keys, ids = matching(block, self.prefix)
        depth = len(self.prefix)
        word = keys if depth < DIGITS_PER_WORD else ids.astype(np.uint64)
        shift = np.uint64(64 - DIGIT_BITS * (depth % DIGITS_PER_WORD + 1))
        return _digit_counts((word >> shift) & np.uint64((1 << DIGIT_BITS) - 1))


@dataclasses.dataclass(frozen=True, slots=True)
class BoundaryPass:
    """The (key, id) pairs of the boundary bin."""

    prefix: tuple[int, ...]

    def __call__(self, block: Block) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        return matching(block, self.prefix)


def matching(block: Block, prefix: tuple[int, ...]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys and ids of the rows whose leading 16-bit digits of (key, id) equal ``prefix``."""
    keys, ids = descending_key(block.hardness), block.ids
    for word_index in range(2):
        digits = prefix[word_index * DIGITS_PER_WORD : (word_index + 1) * DIGITS_PER_WORD]
        if digits:
            word = keys if word_index == 0 else ids.astype(np.uint64)
            value = 0
            for digit in digits:
                value = value << DIGIT_BITS | digit
            mask = word >> np.uint64(64 - DIGIT_BITS * len(digits)) == np.uint64(value)
            keys, ids = keys[mask], ids[mask]
    return keys, ids


@dataclasses.dataclass(frozen=True, slots=True)
class RangePass:
    """Lowest and highest score of the survivors of each group: float64, (groups, 2)."""

    cut: Cut
    groups: int
    grouped: bool

    def __call__(self, block: Block) -> NDArray[np.float64]:
        if not self.grouped:  # no copy of the other columns, no scattered minimum
            score = block.score[self.cut.keeps(block)]
            return np.array([[score.min(initial=np.inf), score.max(initial=-np.inf)]])
        block = block.where(self.cut.keeps(block))
        group = group_of(block, self.grouped)
        found = np.tile([np.inf, -np.inf], (self.groups, 1))
        np.minimum.at(found[:, 0], group, block.score)
        np.maximum.at(found[:, 1], group, block.score)
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class RankDigitPass:
    """Per group, a histogram of the score keys' digit after each of some 16-bit prefixes.

    Used by quantile strata: a first call with no prefix, a second within the bins that hold the
    wanted ranks, so edges are exact to 28 bits of the key (a relative 2**-16).
    """

    cut: Cut
    groups: int
    grouped: bool
    prefixes: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, block: Block) -> list[NDArray[np.int64]]:
        block = block.where(self.cut.keeps(block))
        keys = descending_key(-block.score)
        group = group_of(block, self.grouped)
        high = (keys >> np.uint64(48)).astype(np.int64)
        if self.prefixes is None:
            return [_digit_counts(high[group == index]) for index in range(self.groups)]
        shift, mask = np.uint64(48 - RANK_BITS), np.uint64((1 << RANK_BITS) - 1)
        low = ((keys >> shift) & mask).astype(np.int64)
        answers = []
        for index, wanted in enumerate(self.prefixes):
            mine = group == index
            slot = np.searchsorted(wanted, high[mine]) if wanted else np.zeros(0, np.int64)
            hit = np.isin(high[mine], wanted)
            flat = slot[hit] * (1 << RANK_BITS) + low[mine][hit] if wanted else slot
            answers.append(np.bincount(flat, minlength=len(wanted) << RANK_BITS))
        return answers


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CountPass:
    """Members of each stratum of each group, flat: int64, shape (total strata,)."""

    cut: Cut
    strata: tuple[Strata, ...]
    grouped: bool

    def __call__(self, block: Block) -> NDArray[np.int64]:
        block = block.where(self.cut.keeps(block))
        flat = flat_stratum(block, self.strata, self.grouped)
        return np.bincount(flat, minlength=sum(part.count for part in self.strata))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Rows with the smallest hashes of each stratum, ordered by (stratum, hash)."""

    ids: NDArray[np.int64]
    score: NDArray[np.float64]
    hardness: NDArray[np.float64]
    stratum: NDArray[np.int64]
    hash: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.ids)

    def bottom(self, quotas: NDArray[np.int64]) -> Sample:
        """Keep the ``quotas[b]`` smallest hashes of each stratum ``b``."""
        order = np.lexsort((self.hash, self.stratum))
        stratum = self.stratum[order]
        start = np.searchsorted(stratum, np.arange(len(quotas)))
        rank = np.arange(len(order)) - start[stratum]
        return self.take(order[rank < quotas[stratum]])

    def take(self, rows: NDArray[np.int64]) -> Sample:
        return Sample(
            self.ids[rows],
            self.score[rows],
            self.hardness[rows],
            self.stratum[rows],
            self.hash[rows],
        )

    @staticmethod
    def merge(samples: list[Sample]) -> Sample:
        """Concatenate; follow with :meth:`bottom`."""
        columns = [field.name for field in dataclasses.fields(Sample)]
        return Sample(*(np.concatenate([getattr(s, name) for s in samples]) for name in columns))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SamplePass:
    """A block's bottom-q rows; ``ceiling`` holds per stratum the largest hash worth sorting."""

    cut: Cut
    strata: tuple[Strata, ...]
    grouped: bool
    quotas: NDArray[np.int64]
    ceiling: NDArray[np.uint64]
    seed: int

    def __call__(self, block: Block) -> Sample:
        block = block.where(self.cut.keeps(block))
        flat = flat_stratum(block, self.strata, self.grouped)
        hashes = keyed_hash(block.ids, self.seed)
        near = (hashes <= self.ceiling[flat]) & (self.quotas[flat] > 0)
        rows = block.where(near)
        sample = Sample(rows.ids, rows.score, rows.hardness, flat[near], hashes[near])
        return sample.bottom(self.quotas)


def group_of(block: Block, grouped: bool) -> NDArray[np.int64]:
    """Group of each row: its class when strata are class-proportional, else 0."""
    if grouped and block.labels is not None:
        return block.labels
    return np.zeros(len(block.ids), np.int64)


def flat_stratum(block: Block, strata: tuple[Strata, ...], grouped: bool) -> NDArray[np.int64]:
    """Index of each row's stratum, counted through all groups."""
    if not grouped:
        return strata[0].index(block.score)
    labels = group_of(block, grouped)
    start = np.cumsum([0, *(part.count for part in strata)])
    flat = np.zeros(len(labels), np.int64)
    for index, part in enumerate(strata):
        mine = labels == index
        flat[mine] = start[index] + part.index(block.score[mine])
    return flat


def _digit_counts(digits: NDArray[np.uint64] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(digits.astype(np.int64), minlength=1 << DIGIT_BITS)
