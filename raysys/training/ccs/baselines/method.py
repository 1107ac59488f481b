"""The interface of a one-shot selection method."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError
from raysys.training.ccs.table import ScoreTable


class Method(Protocol):
    """Chooses ``m`` examples of a table; the same seed gives the same ids, in ascending order."""

    def select(self, table: ScoreTable, m: int, seed: int) -> NDArray[np.int64]: ...


def check_budget(table: ScoreTable, m: int) -> None:
    """Check a budget.

    Raises:
        ConfigError: ``m`` is not a whole number in [1, N].
    """
    if isinstance(m, bool) or not isinstance(m, int | np.integer) or not 1 <= m <= len(table):
        raise ConfigError("m", m, f"a whole number in [1, {len(table)}]")


def ids_of(table: ScoreTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids of some rows, ascending."""
    return np.sort(table.ids[rows])


def per_class(labels: NDArray[np.int64], m: int) -> list[tuple[NDArray[np.int64], int]]:
    """Rows and budget of each class, budgets in proportion to class frequency."""
    from raysys.training.ccs.strata import class_budgets

    counts = np.bincount(labels)
    budgets = class_budgets(counts, counts, m)
    return [(np.flatnonzero(labels == c), int(budgets[c])) for c in np.flatnonzero(counts)]
