"""One adjustment round over several shards: one global threshold, no row leaves its shard.

Shards send histograms; then the members of the one bin that the threshold falls into; then the
scores of what they would grow and evict. The answer of each phase is a few numbers. The result is
the one of a single store that held all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysys.ops import fiited_abi as abi
from raysys.ops.fiited_arithmetic import mix
from raysys.training.fiited.config import FiitedConfig
from raysys.training.fiited.native import F32, I64, U64

Pairs = tuple[F32, U64]
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Bin:
    """The bin of the threshold and how many of its members stay; ``index`` -1: everything fits."""

    index: int
    keep: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A chunk is wanted when its (score, tie) is above this one."""

    score: float = -1.0
    tie: int = 0


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a shard would grow and evict under a cut, and its chunks alive now."""

    growers: Pairs
    victims: Pairs
    alive: int


@dataclass(frozen=True, slots=True)
class Orders:
    """What a shard does: its best ``grow``, its worst ``evict``; chunks alive elsewhere after."""

    grow: int
    evict: int
    elsewhere: int


def salt(config: FiitedConfig, round_: int) -> int:
    """The tie-breaking salt of a round, as the compiled store forms it."""
    return mix((config.seed + round_) & MASK)


def find_bin(histograms: Sequence[I64], target: int) -> Bin:
    """Bin in which the ``target`` best chunks of all shards end."""
    total = np.sum(histograms, axis=0)[::-1].cumsum()
    over = np.flatnonzero(total > target)
    if not len(over):
        return Bin(-1, 0)
    first = int(over[0])
    above = int(total[first - 1]) if first else 0
    return Bin(abi.BINS - 1 - first, target - above)


def find_cut(members: Sequence[Pairs], keep: int) -> Cut:
    """Exact threshold inside the bin, ties broken by hash."""
    scores, ties = _joined(members)
    order = np.lexsort((ties, scores))[::-1]
    chosen = order[keep]
    return Cut(float(scores[chosen]), int(ties[chosen]))


def share(wishes: Sequence[Wishes], target: int, churn: int) -> list[Orders]:
    """Grow and evict no more than the exchange needs; the same rule as in one store."""
    alive = sum(w.alive for w in wishes)
    growers = sum(len(w.growers[0]) for w in wishes)
    victims = sum(len(w.victims[0]) for w in wishes)
    room, surplus = max(0, target - alive), max(0, alive - target)
    swaps = min(max(0, growers - room), churn, max(0, victims - surplus))
    grow = _count_best(
        [w.growers for w in wishes], min(growers, swaps if surplus else room + swaps)
    )
    evict = _count_worst([w.victims for w in wishes], min(victims, surplus + swaps))
    after = [w.alive + g - e for w, g, e in zip(wishes, grow, evict)]
    return [Orders(g, e, sum(after) - mine) for g, e, mine in zip(grow, evict, after)]


def _count_best(lists: Sequence[Pairs], take: int) -> list[int]:
    return _count(lists, take, best=True)


def _count_worst(lists: Sequence[Pairs], take: int) -> list[int]:
    return _count(lists, take, best=False)


def _count(lists: Sequence[Pairs], take: int, *, best: bool) -> list[int]:
    """How many of the ``take`` best (or worst) of all lists come from each."""
    scores, ties = _joined(lists)
    owner = np.repeat(np.arange(len(lists)), [len(s) for s, _ in lists])
    order = np.lexsort((ties, scores))
    chosen: npt.NDArray[np.int64] = order[len(order) - take :] if best else order[:take]
    return [int(n) for n in np.bincount(owner[chosen], minlength=len(lists))]


def _joined(lists: Sequence[Pairs]) -> Pairs:
    return np.concatenate([s for s, _ in lists]), np.concatenate([t for _, t in lists])


def churn_of(config: FiitedConfig) -> int:
    """Chunks that one round may exchange at most."""
    assert config.budget_slots is not None
    return max(1, int(np.float32(config.churn_cap) * float(config.budget_slots)))
