"""Where the strata lie, asked of the rows through mergeable passes, and how answers add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from raysys.training.ccs import blocks
from raysys.training.ccs.blocks import Block, Cut
from raysys.training.ccs.strata import Strata, equal_width, from_quantiles

AnswerT = TypeVar("AnswerT")


class MapBlocks(Protocol):
    """Applies a pass to every block and yields the answers, in any order."""

    def __call__(self, function: Callable[[Block], AnswerT], /) -> Iterable[AnswerT]: ...


def make_strata(
    map_blocks: MapBlocks, cut: Cut, groups: int, count: int, edges: str, grouped: bool
) -> tuple[Strata, ...]:
    if edges == "quantile":
        return _quantile_strata(map_blocks, cut, groups, count, grouped)
    low_high = np.tile([np.inf, -np.inf], (groups, 1))
    for part in map_blocks(blocks.RangePass(cut, groups, grouped)):
        low_high[:, 0] = np.minimum(low_high[:, 0], part[:, 0])
        low_high[:, 1] = np.maximum(low_high[:, 1], part[:, 1])
    return tuple(equal_width(float(low), float(high), count) for low, high in low_high)


def _quantile_strata(
    map_blocks: MapBlocks, cut: Cut, groups: int, count: int, grouped: bool
) -> tuple[Strata, ...]:
    first = sum_lists(map_blocks(blocks.RankDigitPass(cut, groups, grouped)))
    plans = []
    for counts in first:
        total, below = int(counts.sum()), np.cumsum(counts)
        ranks = np.arange(1, count) * total // count + 1
        high = np.searchsorted(below, ranks) if total else np.zeros(0, np.int64)
        inner = ranks - np.where(high > 0, below[high - 1], 0) if total else high
        plans.append((high, inner, tuple(sorted({int(value) for value in high}))))
    prefixes: Any = tuple(plan[2] for plan in plans)
    second = sum_lists(map_blocks(blocks.RankDigitPass(cut, groups, grouped, prefixes)))
    strata = []
    for (high, inner, slots), counts in zip(plans, second):
        table = np.cumsum(counts.reshape(-1, 1 << blocks.RANK_BITS), axis=1)
        values = [
            _from_key(int(digit), int(np.searchsorted(table[slots.index(int(digit))], rank)))
            for digit, rank in zip(high, inner)
        ]
        strata.append(from_quantiles(np.asarray(values, np.float64)))
    return tuple(strata)


def _from_key(high: int, low: int) -> float:
    """Smallest float whose ascending order-preserving key starts with these 28 bits."""
    key = high << 48 | low << (48 - blocks.RANK_BITS)
    bits = key ^ (1 << 63) if key >> 63 else key ^ blocks.ALL_ONES
    value = float(np.asarray([bits], np.uint64).view(np.float64)[0])
    return value if math.isfinite(value) else math.copysign(float(np.finfo(np.float64).max), value)


def sum_counts(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    total = np.zeros(0, np.int64)
    for part in parts:
        total = add_padded(total, part)
    return total


def sum_lists(parts: Iterable[list[NDArray[np.int64]]]) -> list[NDArray[np.int64]]:
    columns = zip(*parts)
    return [sum_counts(column) for column in columns]


def add_padded(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(max(len(left), len(right)), np.int64)
    total[: len(left)] += left
    total[: len(right)] += right
    return total
