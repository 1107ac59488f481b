"""Strata and budgets: equal-width strata of the score range, and water-filling over them.

Algorithm 1 of the CCS paper: the smallest stratum is served first, and what it cannot use flows
to the larger ones. The top edge belongs to the last stratum whatever the sign of the maximum
(the released code scales the maximum by 1.0001, which loses it when it is zero or negative).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError, InfeasibleError

IntArray = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """Edges of the strata of one group (a class, or everything).

    Args:
        edges: float64, strictly ascending inner edges; ``len(edges) + 1`` strata.
    """

    edges: NDArray[np.float64]

    @property
    def count(self) -> int:
        return len(self.edges) + 1

    def index(self, score: NDArray[np.float64]) -> IntArray:
        """Stratum of each score; a score on an inner edge belongs to the stratum above it."""
        index: IntArray = np.searchsorted(self.edges, score, side="right").astype(np.int64)
        return index


def equal_width(low: float, high: float, count: int) -> Strata:
    """``count`` strata of equal width over [low, high]; a single stratum when low equals high."""
    if high <= low:
        return Strata(np.zeros(0))
    steps = np.arange(1, count) / count
    # Convex combination: high - low would overflow for scores near the largest float.
    edges = low * (1 - steps) + high * steps
    return Strata(_ascending(edges, low, high))


def from_quantiles(values: NDArray[np.float64]) -> Strata:
    """Strata from inner quantiles; equal neighbours merge."""
    return Strata(np.unique(values))


def allocate(sizes: IntArray, budget: int) -> IntArray:
    """Share a budget over strata: equal shares, as far as each stratum's size allows.

    Args:
        sizes: members of each stratum, int64, shape (k,).
        budget: examples to take in all.

    Returns:
        Quotas, int64, shape (k,): they sum to ``budget``, none exceeds its stratum, and two strata
        that are not exhausted differ by at most one. Ties are served by index.

    Raises:
        InfeasibleError: the strata hold fewer than ``budget`` (the released code returns fewer).
        ConfigError: a negative budget.
    """
    if budget < 0:
        raise ConfigError("budget", budget, "a number of examples >= 0")
    if budget > int(sizes.sum()):
        raise InfeasibleError(
            f"a budget of {budget}", f"the strata hold {int(sizes.sum())}", "Lower m or beta"
        )
    quotas = np.zeros(len(sizes), np.int64)
    remaining = budget
    for served, stratum in enumerate(np.argsort(sizes, kind="stable")):
        share = remaining // (len(sizes) - served)
        quotas[stratum] = min(int(sizes[stratum]), share)
        remaining -= int(quotas[stratum])
    return quotas


def class_budgets(
    frequency: IntArray, available: IntArray, budget: int, min_per_class: int = 0
) -> IntArray:
    """Budgets proportional to class frequency, each within what the class has left.

    Largest remainders get the odd examples (ties by class index); what a class cannot use goes to
    the classes with room, again in proportion. The released code's class-balanced selection uses
    the last class's size for every class.

    Raises:
        InfeasibleError: the classes hold fewer than ``budget``, or the minima need more.
    """
    if budget > int(available.sum()):
        raise InfeasibleError(
            f"a budget of {budget}", f"{int(available.sum())} are left", "Lower m"
        )
    budgets = np.minimum(np.where(frequency > 0, min_per_class, 0), available)
    if int(budgets.sum()) > budget:
        raise InfeasibleError(
            f"{min_per_class} examples per class",
            f"that needs {int(budgets.sum())} of {budget}",
            "Lower min_per_class or raise m",
        )
    target = frequency * (budget / max(1, int(frequency.sum())))
    while (remaining := budget - int(budgets.sum())) > 0:
        room = available - budgets
        want = np.where(room > 0, np.maximum(target - budgets, 1e-12), 0.0)
        share = want / want.sum() * remaining
        step = np.minimum(np.floor(share).astype(np.int64), room)
        if not step.any():
            order = np.lexsort((np.arange(len(share)), -(share - np.floor(share))))
            order = order[room[order] > 0][:remaining]
            step[order] = 1
        budgets = budgets + step
    result: IntArray = budgets
    return result


def _ascending(edges: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Drop edges that rounding made equal (a range of few representable numbers)."""
    kept = np.unique(edges)
    return kept[(kept > low) & (kept <= high)]
