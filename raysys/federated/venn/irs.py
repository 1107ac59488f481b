"""Algorithm 1, intersection resource scheduling: who owns which part of the device population.

Paper, section 4.2 and listing 1. Jobs inside a group are served smallest first; the scarcest group
takes its devices first; then abundant groups take intersections back while they have more pressure
(waiting jobs per unit of supply) than the group they take from.

Where we differ: the scarce side's pressure uses its current allocation, as the text and the
released program do and line 15 of the listing does not; only atoms *owned* by the scarcer group
move, since lines 16-17 give a part two owners once there are three groups; and leftovers are handed
down, so that no eligible device is refused while an eligible job waits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError
from raysys.federated.venn.columns import ColumnPlan, RequestColumns
from raysys.federated.venn.fairness import queue_factor, request_factor
from raysys.federated.venn.requests import GroupedPlan, Request
from raysys.federated.venn.supply import TINY_RATE, SupplyView

DemandScope = Literal["round", "total", "blend"]
COLUMNS_ABOVE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class IRSConfig:
    """Settings of the planner.

    Args:
        demand_scope: what "smallest first" compares: the open round (paper's default), all coming
            rounds, or their weighted geometric mean.
        blend: weight of the total under ``blend``; 0 equals ``round``, 1 equals ``total``.
        eps: starvation knob of section 4.4; 0 is pure IRS.
        affected: count the jobs that a refusal really delays (released program), or all.
        yield_factor: beyond the paper: an atom's owner lets a job of another eligible group go
            first that is this many times smaller. None is the paper (never), 1 is SRSF.
    """

    demand_scope: DemandScope = "round"
    blend: float = 0.5
    eps: float = 0.0
    affected: Literal["delayed", "length"] = "delayed"
    yield_factor: float | None = None

    def __post_init__(self) -> None:
        check_choice(self, "demand_scope", ("round", "total", "blend"))
        check_choice(self, "affected", ("delayed", "length"))
        check_range(self, "blend", 0, 1)
        check_range(self, "eps", 0)
        if self.yield_factor is not None:
            check_range(self, "yield_factor", 1)
        check(self, "eps", self.eps <= 100, "a number in [0, 100]")


@dataclass(slots=True)
class _Group:
    """A group while the plan is made.

    ``sums`` are running sums of sizes in service order, over all groups; the group's own are those
    from ``first`` on, less ``before``. ``demand`` is the sum of the sizes of its jobs.
    """

    index: int
    count: int
    sums: list[float]
    first: int
    before: float
    queue: float
    supply: float
    atoms: int
    owned: int = 0
    allocated: float = 0.0
    demand: float = field(init=False)

    def __post_init__(self) -> None:
        self.demand = self.sums[self.first + self.count - 1] - self.before

    def served_within(self, demand: float) -> int:
        """Jobs at its head whose running sum stays below ``demand``."""
        last = self.first + self.count
        return bisect_left(self.sums, demand + self.before, self.first, last) - self.first


@dataclass(frozen=True, slots=True)
class IRS:
    """The planner; deterministic and free of state."""

    config: IRSConfig = field(default_factory=IRSConfig)

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> GroupedPlan:
        """Order the groups' requests and split the atoms between the groups.

        Requests without remaining demand are ignored. Cost O(m log m + n^2) for m requests and n
        groups, each comparison on bitsets of atoms.
        """
        if len(requests) > COLUMNS_ABOVE and not self.config.eps:
            return self._plan_many(requests, supply)
        order, sizes, groups = self._groups(requests, supply, now_s)
        owner, scarcity = self._split(groups, supply)
        yields = self.config.yield_factor is not None
        return GroupedPlan(
            order=order,
            owner=owner,
            scarcity=scarcity,
            masks=supply.masks,
            allocated={group.index: group.allocated for group in groups},
            sizes=sizes if yields else {},
            yield_factor=self.config.yield_factor,
        )

    def plan_columns(self, columns: RequestColumns, supply: SupplyView) -> ColumnPlan:
        """The same decision over columns; the starvation knob must be 0.

        Raises:
            ConfigError: ``eps`` is not 0.
        """
        if self.config.eps:
            raise ConfigError("eps", self.config.eps, "0 when planning over columns")
        sizes = columns.sizes(self.config.demand_scope, self.config.blend)
        rows = columns.service_order(sizes)
        present, first = np.unique(columns.group[rows], return_index=True)
        edges = [*first.tolist(), len(rows)]
        sums = np.cumsum(sizes[rows]).tolist()
        groups, spans = [], {}
        for place, index in enumerate(present.tolist()):
            low, high = edges[place], edges[place + 1]
            spans[index] = (low, high)
            before = sums[low - 1] if low else 0.0
            rate, atoms = supply.group_rates[index], supply.group_atoms[index]
            count = high - low
            groups.append(_Group(index, count, sums, low, before, float(count), rate, atoms))
        owner, scarcity = self._split(groups, supply)
        return ColumnPlan(
            rows,
            spans,
            owner,
            scarcity,
            {group.index: group.allocated for group in groups},
            sizes,
        )

    def _plan_many(self, requests: Sequence[Request], supply: SupplyView) -> GroupedPlan:
        columns = RequestColumns.of(requests)
        plan = self.plan_columns(columns, supply)
        ordered = [requests[row] for row in plan.rows.tolist()]
        yields = self.config.yield_factor is not None
        return GroupedPlan(
            order={group: ordered[low:high] for group, (low, high) in plan.spans.items()},
            owner=plan.owner,
            scarcity=plan.scarcity,
            masks=supply.masks,
            allocated=plan.allocated,
            sizes=dict(zip(columns.job.tolist(), plan.sizes.tolist())) if yields else {},
            yield_factor=self.config.yield_factor,
        )

    def _split(self, groups: list[_Group], supply: SupplyView) -> tuple[list[int], list[int]]:
        """Steps 2 and 3: the owner of every atom, and the groups from the scarcest on."""
        scarce_first = sorted(groups, key=lambda group: (group.supply, group.index))
        _first_split(scarce_first, supply)
        self._exchange(scarce_first[::-1], supply)
        owner = [-1] * len(supply.masks)
        for group in groups:
            for atom in _bits(group.owned):
                owner[atom] = group.index
        return owner, [group.index for group in scarce_first]

    def demand_of(
        self, request: Request, supply: SupplyView, competitors: int, now_s: float
    ) -> float:
        """Demand that the order compares: scope of the config, times the fairness factor."""
        scope = self.config.demand_scope
        if scope == "round":
            demand = float(request.remaining)
        elif scope == "total":
            demand = float(request.total_remaining())
        else:
            weight = self.config.blend
            demand = request.remaining ** (1 - weight) * request.total_remaining() ** weight
        if self.config.eps:
            demand *= request_factor(request, supply, competitors, self.config.eps, now_s)
        return demand

    def _groups(
        self, requests: Sequence[Request], supply: SupplyView, now_s: float
    ) -> tuple[dict[int, list[Request]], dict[int, float], list[_Group]]:
        """Step 1: requests of every group in service order, sizes by job, and the groups."""
        waiting = [request for request in requests if request.remaining > 0]
        competitors = len(waiting)
        sizes = {item.job: self.demand_of(item, supply, competitors, now_s) for item in waiting}
        waiting.sort(key=lambda item: (sizes[item.job], item.opened_s, item.job))
        order: dict[int, list[Request]] = {}
        for request in waiting:
            order.setdefault(request.group, []).append(request)
        found = []
        for index, members in sorted(order.items()):
            queue = float(len(members))
            if self.config.eps:
                queue *= queue_factor(members, supply, competitors, self.config.eps, now_s)
            sums = list(accumulate(sizes[item.job] for item in members))
            rate, atoms = supply.group_rates[index], supply.group_atoms[index]
            found.append(_Group(index, len(members), sums, 0, 0.0, queue, rate, atoms))
        return order, sizes, found

    def _exchange(self, abundant_first: list[_Group], supply: SupplyView) -> None:
        """Step 3: take intersections back, from the next scarcer group downwards."""
        for place, group in enumerate(abundant_first):
            if group.allocated <= 0:
                continue
            atoms, supply_rate = group.atoms, group.supply
            for scarce in abundant_first[place + 1 :]:
                take = scarce.owned & atoms
                if not take or scarce.supply >= supply_rate:
                    continue
                waiting = self._affected(group, scarce)
                scarce_pressure = scarce.queue / max(scarce.allocated, TINY_RATE)
                if waiting / group.allocated <= scarce_pressure:
                    break
                _move(take, scarce, group, supply)

    def _affected(self, group: _Group, scarce: _Group) -> float:
        """Jobs of ``group`` that would finish later without the devices of ``scarce``.

        After ``W_k`` seconds the scarce group is done and its devices fall back, so only jobs that
        would be served sooner than that are delayed (at least one, so that a queue never counts as
        empty).
        """
        if self.config.affected == "length":
            return group.queue
        wait_s = scarce.demand / max(scarce.allocated, TINY_RATE)
        limit = wait_s * group.allocated
        if group.demand <= limit:
            return group.queue
        delayed = max(group.served_within(limit), 1)
        return group.queue * delayed / group.count


def _first_split(scarce_first: list[_Group], supply: SupplyView) -> None:
    """Step 2: every group, scarcest first, takes the atoms that nobody owns yet."""
    taken = 0
    for group in scarce_first:
        group.owned = group.atoms & ~taken
        taken |= group.atoms
        group.allocated = _rate(group.owned, supply.rates)


def _move(take: int, scarce: _Group, group: _Group, supply: SupplyView) -> None:
    """Give the atoms ``take`` of ``scarce`` to ``group``, which inherits the jobs that now wait."""
    rate = _rate(take, supply.rates)
    before = scarce.allocated
    scarce.owned &= ~take
    scarce.allocated = max(before - rate, 0.0) if scarce.owned else 0.0
    group.owned |= take
    group.allocated += rate
    lost = min(rate / before, 1.0) if before > 0 else 1.0
    group.queue += scarce.queue * lost


def _rate(atoms: int, rates: Sequence[float]) -> float:
    """Summed rate of a bitset of atoms."""
    total = 0.0
    while atoms:
        low = atoms & -atoms
        total += rates[low.bit_length() - 1]
        atoms ^= low
    return total


def _bits(bitset: int) -> list[int]:
    """Places of the one bits, lowest first."""
    found = []
    while bitset:
        low = bitset & -bitset
        found.append(low.bit_length() - 1)
        bitset ^= low
    return found
