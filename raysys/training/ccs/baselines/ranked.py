"""Methods that need one score, or none: random, hardest and easiest first, cutoff plus random."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.errors import InfeasibleError
from raysys.training.ccs.baselines.method import check_budget, ids_of, per_class
from raysys.training.ccs.selection import SelectionConfig, select_ccs
from raysys.training.ccs.table import ScoreTable


@dataclasses.dataclass(frozen=True, slots=True)
class Random:
    """Uniform sampling without replacement."""

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        check_budget(table, m)
        rows = np.argsort(table.ids)  # so that the row order does not matter
        return ids_of(table, rows[np.random.default_rng(seed).permutation(len(rows))[:m]])


@dataclasses.dataclass(frozen=True, slots=True)
class StratifiedRandom:
    """Uniform sampling within each class, classes in proportion."""

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        check_budget(table, m)
        by_id = table.take(np.argsort(table.ids))
        rng = np.random.default_rng(seed)
        groups = per_class(by_id.need_labels("StratifiedRandom"), m)
        rows = np.concatenate([rng.permutation(group)[:budget] for group, budget in groups])
        return ids_of(by_id, rows)


@dataclasses.dataclass(frozen=True, slots=True)
class HardestFirst:
    """The ``m`` hardest by a score, ties by id; ignores the seed."""

    score: str = "aum"

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        check_budget(table, m)
        return ids_of(table, np.lexsort((table.ids, -table.hardness(self.score)))[:m])


@dataclasses.dataclass(frozen=True, slots=True)
class EasiestFirst:
    """The ``m`` easiest by a score, ties by id; ignores the seed."""

    score: str = "aum"

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        check_budget(table, m)
        return ids_of(table, np.lexsort((table.ids, table.hardness(self.score)))[:m])


@dataclasses.dataclass(frozen=True, slots=True)
class CutRandom:
    """CCS without strata: drop the ``beta`` hardest, sample the rest uniformly."""

    beta: float
    cutoff: str = "aum"

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        check_budget(table, m)
        order = np.lexsort((table.ids, -table.hardness(self.cutoff)))
        pool = order[int(self.beta * len(table) + 1e-9) :]
        if m > len(pool):
            reason = f"beta={self.beta:g} leaves {len(pool)}"
            raise InfeasibleError(f"a coreset of {m}", reason, "Lower beta")
        return ids_of(table, np.random.default_rng(seed).permutation(pool)[:m])


@dataclasses.dataclass(frozen=True, slots=True)
class CCS:
    """CCS itself, behind the same interface."""

    beta: float = 0.0
    strata: int = 50
    score: str = "aum"
    class_balanced: bool = False

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]:
        config = SelectionConfig(
            beta=self.beta, strata=self.strata, seed=seed, class_balanced=self.class_balanced
        )
        return select_ccs(table, m, config, score=self.score).ids
