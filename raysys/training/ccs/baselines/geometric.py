"""Methods on features: moderate coreset, k-centre greedy, herding and prototypes.

Moderate: Xia et al., ICLR 2023. k-centre: Sener & Savarese, ICLR 2018. Herding: Welling, ICML
2009. Prototypes: Sorscher et al., NeurIPS 2022.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.training.ccs.baselines.method import check_budget, ids_of, per_class
from raysys.training.ccs.table import ScoreTable

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Moderate:
    """Per class, the examples whose distance from the class centre is nearest to the median."""

    def select(self, table: ScoreTable, m: int, seed: int) -> Rows:
        check_budget(table, m)
        features = table.need_features("Moderate")
        chosen = []
        for rows, budget in per_class(table.need_labels("Moderate"), m):
            group = features[rows]
            distance = np.linalg.norm(group - group.mean(0), axis=1)
            from_median = np.abs(distance - np.median(distance))
            chosen.append(rows[np.lexsort((table.ids[rows], from_median))[:budget]])
        return ids_of(table, np.concatenate(chosen))


@dataclasses.dataclass(frozen=True, slots=True)
class KCenter:
    """Greedy k-centre: always the example farthest from what is chosen; O(N m D) time, O(N) memory.

    Args:
        by_class: run it within each class, budgets in proportion to class frequency.
    """

    by_class: bool = False

    def select(self, table: ScoreTable, m: int, seed: int) -> Rows:
        check_budget(table, m)
        features = table.need_features("KCenter")
        rng = np.random.default_rng(seed)
        if not self.by_class:
            return ids_of(table, _farthest_first(features, m, rng))
        groups = per_class(table.need_labels("KCenter"), m)
        parts = [rows[_farthest_first(features[rows], b, rng)] for rows, b in groups if b]
        return ids_of(table, np.concatenate(parts))


@dataclasses.dataclass(frozen=True, slots=True)
class Herding:
    """Per class, greedily keep the mean of the chosen features near the class mean."""

    def select(self, table: ScoreTable, m: int, seed: int) -> Rows:
        check_budget(table, m)
        features = table.need_features("Herding")
        groups = per_class(table.need_labels("Herding"), m)
        parts = [rows[_herd(features[rows], budget)] for rows, budget in groups]
        return ids_of(table, np.concatenate(parts))


@dataclasses.dataclass(frozen=True, slots=True)
class Prototypes:
    """Distance to the nearest k-means centre, hard (far) or easy (near) examples first."""

    clusters: int = 10
    hardest: bool = True

    def select(self, table: ScoreTable, m: int, seed: int) -> Rows:
        from sklearn.cluster import KMeans

        check_budget(table, m)
        features = table.need_features("Prototypes")
        model = KMeans(min(self.clusters, len(table)), n_init=1, random_state=seed).fit(features)
        distance = model.transform(features).min(1)
        order = np.lexsort((table.ids, -distance if self.hardest else distance))
        return ids_of(table, order[:m])


def _farthest_first(features: Floats, m: int, rng: np.random.Generator) -> Rows:
    square = (features * features).sum(1)
    nearest = np.full(len(features), np.inf, np.float32)
    chosen = np.zeros(m, np.int64)
    row = int(rng.integers(len(features)))
    for index in range(m):
        chosen[index] = row
        distance = square - 2 * (features @ features[row]) + square[row]
        nearest = np.minimum(nearest, distance)
        nearest[row] = -np.inf  # never twice, even among duplicates
        row = int(nearest.argmax())
    return chosen


def _herd(features: Floats, m: int) -> Rows:
    mean = features.mean(0)
    free = np.ones(len(features), np.bool_)
    total = np.zeros_like(mean)
    chosen = np.zeros(m, np.int64)
    square = (features * features).sum(1)
    for index in range(m):
        # argmin of |mean (index + 1) - total - x|: the constant part of the square drops out.
        target = mean * (index + 1) - total
        cost = np.where(free, square - 2 * (features @ target), np.inf)
        row = int(cost.argmin())
        chosen[index], free[row] = row, False
        total += features[row]
    return chosen
