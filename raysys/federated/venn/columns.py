"""Open requests as columns, for planning with thousands of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.federated.venn.requests import Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RequestColumns:
    """Columns of equal length m; see :class:`~raysys.federated.venn.requests.Request`.

    ``rounds_left`` counts the rounds after the open one.
    """

    job: Ints
    group: Ints
    remaining: Ints
    demand: Ints
    rounds_left: Ints
    opened_s: Floats

    @classmethod
    def of(cls, requests: Sequence[Request]) -> RequestColumns:
        """Collect the columns of request objects."""
        count = len(requests)
        left = (item.rounds - item.rounds_done - 1 for item in requests)
        return cls(
            np.fromiter((item.job for item in requests), np.int64, count),
            np.fromiter((item.group for item in requests), np.int64, count),
            np.fromiter((item.remaining for item in requests), np.int64, count),
            np.fromiter((item.demand for item in requests), np.int64, count),
            np.maximum(np.fromiter(left, np.int64, count), 0),
            np.fromiter((item.opened_s for item in requests), np.float64, count),
        )

    def sizes(self, scope: str, blend: float) -> Floats:
        """Demand that the order compares, in devices."""
        if scope == "round":
            return self.remaining.astype(np.float64)
        total = (self.remaining + self.demand * self.rounds_left).astype(np.float64)
        if scope == "total":
            return total
        mixed: Floats = self.remaining ** (1 - blend) * total**blend
        return mixed

    def service_order(self, sizes: Floats) -> Ints:
        """Rows with remaining demand, by group, then size, open time and job.

        Jobs usually come in ascending order, which saves a sort key.
        """
        rows = np.flatnonzero(self.remaining > 0)
        keys: list[npt.NDArray[Any]] = [
            self.opened_s[rows],
            sizes[rows],
            self.group[rows].astype(np.int16),
        ]
        if np.any(np.diff(self.job[rows]) < 0):
            keys.insert(0, self.job[rows])
        ordered: Ints = rows[np.lexsort(keys)]
        return ordered


@dataclass(frozen=True, slots=True, eq=False)
class ColumnPlan:
    """A plan over :class:`RequestColumns`.

    Args:
        rows: places in the columns in service order, group by group.
        spans: first and last place (exclusive) of every group in ``rows``.
        owner, scarcity: as in :class:`~raysys.federated.venn.requests.GroupedPlan`.
        sizes: demand that the order compared, for every place of the columns.
    """

    rows: Ints
    spans: dict[int, tuple[int, int]]
    owner: list[int]
    scarcity: list[int]
    allocated: dict[int, float]
    sizes: Floats
