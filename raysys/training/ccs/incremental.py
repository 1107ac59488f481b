"""Incremental coresets: new data merges into a kept summary, and old data is not read again.

A plan fixes what may not move as data arrives: the cut (as a place in the hardness order, not a
share), the strata, the budget and the seed. A summary then holds each stratum's size and its
smallest hashes, as many as any later budget can ask for: adding data only ever lowers the level of
the water-filling, so "one more than today's level" per stratum is always enough, and merging
summaries of any partition gives exactly the coreset of all the rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError
from raysys.training.ccs.blocks import ALL_ONES, Block, CountPass, Cut, Sample, SamplePass
from raysys.training.ccs.selection import Selection
from raysys.training.ccs.strata import Strata, allocate


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SummaryPlan:
    """What stays fixed: the cut, the strata's edges, the budget and the seed of the hash."""

    cut: Cut
    strata: Strata
    m: int
    seed: int

    @classmethod
    def of(cls, selection: Selection, seed: int) -> SummaryPlan:
        """The plan of a selection without class-proportional strata.

        Raises:
            ConfigError: the selection was class-balanced.
        """
        if len(selection.strata) != 1:
            raise ConfigError("class_balanced", True, "a selection over one group of strata")
        return cls(selection.cut, selection.strata[0], len(selection.ids), seed)

    def same_as(self, other: SummaryPlan) -> bool:
        """Whether summaries of both plans may merge."""
        return (
            self.cut == other.cut
            and self.m == other.m
            and self.seed == other.seed
            and np.array_equal(self.strata.edges, other.strata.edges)
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CoresetSummary:
    """Sizes of the strata and their smallest hashes, for rows seen so far."""

    plan: SummaryPlan
    sizes: NDArray[np.int64]
    sample: Sample

    @classmethod
    def of(cls, block: Block, plan: SummaryPlan) -> CoresetSummary:
        """Summarise some rows.

        Memory is at most about ``m`` rows plus one per stratum, beside the rows themselves.
        """
        sizes = CountPass(plan.cut, (plan.strata,), False)(block)
        ceiling = np.full(plan.strata.count, ALL_ONES, np.uint64)
        capacity = _capacity(sizes, plan.m)
        ask = SamplePass(plan.cut, (plan.strata,), False, capacity, ceiling, plan.seed)
        return cls(plan, sizes, ask(block))

    def merge(self, other: CoresetSummary) -> CoresetSummary:
        """The summary of both parts' rows.

        Raises:
            ConfigError: the plans differ, or an example is in both.
        """
        if not self.plan.same_as(other.plan):
            raise ConfigError("plan", "another cut, edges, budget or seed", "summaries of one plan")
        both = np.intersect1d(self.sample.ids, other.sample.ids)
        if len(both):
            raise ConfigError("ids", both[:5].tolist(), "examples that are in one part only")
        sizes = self.sizes + other.sizes
        merged = Sample.merge([self.sample, other.sample])
        return CoresetSummary(self.plan, sizes, merged.bottom(_capacity(sizes, self.plan.m)))

    def coreset_ids(self) -> NDArray[np.int64]:
        """Ids of the coreset of everything seen, ascending.

        Raises:
            InfeasibleError: fewer rows than the budget survive the cut so far.
        """
        return np.sort(self.sample.bottom(allocate(self.sizes, self.plan.m)).ids)


def _capacity(sizes: NDArray[np.int64], m: int) -> NDArray[np.int64]:
    """Rows worth keeping per stratum: one more than the highest quota, whatever comes later."""
    level = int(allocate(sizes, min(m, int(sizes.sum()))).max())
    return np.full(len(sizes), m if int(sizes.sum()) < m else level + 1, np.int64)
