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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from raysys.config import check, check_choice, check_range
from raysys.federated.venn.fairness import queue_factor, request_factor
from raysys.federated.venn.requests import GroupedPlan, Request
from raysys.federated.venn.supply import TINY_RATE, SupplyView

DemandScope = Literal["round", "total", "blend"]
SORT_IN_NUMPY_ABOVE = 256


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
        check(self, "eps", self.eps <= 100, "a number in [0, 100]", "Larger values overflow")


@dataclass(slots=True)
class _Group:
    """A group while the plan is made."""

    index: int
    requests: list[Request]
    cumulative: list[float]
    queue: float
    supply: float
    atoms: int
    owned: int = 0
    allocated: float = 0.0


@dataclass(frozen=True, slots=True)
class IRS:
    """The planner; deterministic and free of state."""

    config: IRSConfig = field(default_factory=IRSConfig)

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> GroupedPlan:
        """Order the groups' requests and split the atoms between the groups.

        Requests without remaining demand are ignored. Cost O(m log m + n^2) for m requests and n
        groups, each comparison on bitsets of atoms.
        """
        groups = self._groups(requests, supply)
        scarce_first = sorted(groups, key=lambda group: (group.supply, group.index))
        _first_split(scarce_first, supply)
        self._exchange(scarce_first[::-1], supply)
        owner = [-1] * len(supply.masks)
        for group in groups:
            for atom in _bits(group.owned):
                owner[atom] = group.index
        return GroupedPlan(
            order={group.index: group.requests for group in groups},
            owner=owner,
            scarcity=[group.index for group in scarce_first],
            masks=supply.masks,
            allocated={group.index: group.allocated for group in groups},
            sizes=_sizes(groups) if self.config.yield_factor is not None else {},
            yield_factor=self.config.yield_factor,
        )

    def demand_of(self, request: Request, supply: SupplyView, competitors: int) -> float:
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
            demand *= request_factor(request, supply, competitors, self.config.eps)
        return demand

    def _groups(self, requests: Sequence[Request], supply: SupplyView) -> list[_Group]:
        open_requests = [request for request in requests if request.remaining > 0]
        competitors = len(open_requests)
        demands = [self.demand_of(request, supply, competitors) for request in open_requests]
        members: dict[int, tuple[list[Request], list[float]]] = {}
        for place in _service_order(open_requests, demands):
            request = open_requests[place]
            entry = members.get(request.group)
            if entry is None:
                entry = members[request.group] = ([], [])
            entry[0].append(request)
            entry[1].append(demands[place])
        found = []
        for index, (ordered, sizes) in sorted(members.items()):
            queue = float(len(ordered))
            if self.config.eps:
                queue *= queue_factor(ordered, supply, competitors, self.config.eps)
            sums = list(accumulate(sizes))
            rate, atoms = supply.group_rates[index], supply.group_atoms[index]
            found.append(_Group(index, ordered, sums, queue, rate, atoms))
        return found

    def _exchange(self, abundant_first: list[_Group], supply: SupplyView) -> None:
        """Step 3: take intersections back, from the next scarcer group downwards."""
        for place, group in enumerate(abundant_first):
            if group.allocated <= 0:
                continue
            for scarce in abundant_first[place + 1 :]:
                take = scarce.owned & group.atoms
                if not take or scarce.supply >= group.supply:
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
        if self.config.affected == "length" or not scarce.cumulative:
            return group.queue
        wait_s = scarce.cumulative[-1] / max(scarce.allocated, TINY_RATE)
        limit = wait_s * group.allocated
        if group.cumulative[-1] <= limit:
            return group.queue
        delayed = max(bisect_left(group.cumulative, limit), 1)
        return group.queue * delayed / len(group.requests)


def _first_split(scarce_first: list[_Group], supply: SupplyView) -> None:
    """Step 2: every group, scarcest first, takes the atoms that nobody owns yet."""
    taken = 0
    for group in scarce_first:
        group.owned = group.atoms & ~taken
        taken |= group.atoms
        group.allocated = sum(supply.rates[atom] for atom in _bits(group.owned))


def _move(take: int, scarce: _Group, group: _Group, supply: SupplyView) -> None:
    """Give the atoms ``take`` of ``scarce`` to ``group``, which inherits the jobs that now wait."""
    rate = sum(supply.rates[atom] for atom in _bits(take))
    before = scarce.allocated
    scarce.owned &= ~take
    scarce.allocated = max(before - rate, 0.0) if scarce.owned else 0.0
    group.owned |= take
    group.allocated += rate
    lost = min(rate / before, 1.0) if before > 0 else 1.0
    group.queue += scarce.queue * lost


def _sizes(groups: Sequence[_Group]) -> dict[int, float]:
    """Demand that the order compared, by job."""
    sizes = {}
    for group in groups:
        for request, before, after in zip(
            group.requests, [0.0, *group.cumulative], group.cumulative
        ):
            sizes[request.job] = after - before
    return sizes


def _service_order(requests: Sequence[Request], demands: Sequence[float]) -> Sequence[int]:
    """Indices by demand, open time, job; one list for all groups, since each keeps the order."""
    if len(requests) <= SORT_IN_NUMPY_ABOVE:
        key: Callable[[int], tuple[float, float, int]] = lambda place: (  # noqa: E731
            demands[place],
            requests[place].opened_s,
            requests[place].job,
        )
        return sorted(range(len(requests)), key=key)
    jobs = np.fromiter((request.job for request in requests), np.int64, len(requests))
    opened = np.fromiter((request.opened_s for request in requests), np.float64, len(requests))
    order: list[int] = np.lexsort((jobs, opened, np.asarray(demands))).tolist()
    return order


def _bits(bitset: int) -> list[int]:
    """Places of the one bits, lowest first."""
    found = []
    while bitset:
        low = bitset & -bitset
        found.append(low.bit_length() - 1)
        bitset ^= low
    return found
