"""The open round of a job, as every policy sees it, and the plan that a policy returns."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Protocol

from raysys.federated.venn.supply import SupplyView

ALL_CLASSES = -1


@dataclass(slots=True)
class Request:
    """One open round.

    Args:
        job: dense index of the job; also the last tie-break of every order.
        group: bit of the job's requirement.
        demand: devices that the round asks for.
        remaining: devices still to be assigned.
        rounds: rounds that the job declared, 0 when unknown.
        rounds_done: rounds finished.
        opened_s: when this round was opened; a repeated attempt keeps it, or equal requests that
            miss their deadlines in turn would take the devices from one another for ever.
        registered_s: when the job was registered.
        priority: uniform draw in [0, 1) made when the request was opened (random policy).
        response_s: estimate of the response collection time.
        classes: bitset of capability classes that this round accepts; -1 means all.
        attempt: serial number of the request within its job; a new attempt is a new request.
    """

    job: int
    group: int
    demand: int
    remaining: int
    rounds: int = 0
    rounds_done: int = 0
    opened_s: float = 0.0
    registered_s: float = 0.0
    priority: float = 0.0
    response_s: float = 0.0
    classes: int = ALL_CLASSES
    attempt: int = 0

    def attained(self) -> int:
        """Devices of its finished rounds: the service that counted."""
        return self.rounds_done * self.demand

    def total_remaining(self) -> int:
        """Devices needed over this and all coming rounds."""
        return self.remaining + self.demand * max(self.rounds - self.rounds_done - 1, 0)


class Plan(Protocol):
    """An immutable decision: who is asked first for each atom."""

    def ranking(self, atom: int) -> Iterator[Request]:
        """Requests in the order in which a device of ``atom`` is offered to them."""
        ...


class Policy(Protocol):
    """Orders the open requests; called on every job event, never per check-in."""

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> Plan:
        """Decide from the requests with ``remaining > 0``."""
        ...


@dataclass(frozen=True, slots=True)
class OrderedPlan:
    """One order for all devices; every device goes to the first request it is eligible for."""

    order: Sequence[Request]
    masks: tuple[int, ...]

    def ranking(self, atom: int) -> Iterator[Request]:
        mask = self.masks[atom]
        return (request for request in self.order if mask >> request.group & 1)


@dataclass(frozen=True, slots=True)
class GroupedPlan:
    """Every atom has an owner group; behind it come the other groups, scarcest first.

    Args:
        order: requests of every group with open demand, in service order.
        owner: owner group of every atom, -1 when no group with demand is eligible.
        scarcity: groups with open demand, scarcest first.
        masks: eligibility mask of every atom.
        allocated: devices per second owned by every group of ``order``.
        sizes: demand that the order compared, by job; only needed with ``yield_factor``.
        yield_factor: a job of another group that is this many times smaller goes before the
            owner's; None never.
    """

    order: dict[int, list[Request]]
    owner: list[int]
    scarcity: list[int]
    masks: tuple[int, ...]
    allocated: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    yield_factor: float | None = None

    def groups(self, atom: int) -> Iterator[int]:
        """Groups in the order in which a device of ``atom`` is offered to them."""
        owner = self.owner[atom]
        if owner >= 0:
            yield owner
            mask = self.masks[atom]
            for group in self.scarcity:
                if group != owner and mask >> group & 1:
                    yield group

    def ranking(self, atom: int) -> Iterator[Request]:
        groups = self.groups(atom)
        if self.yield_factor is None:
            return chain.from_iterable(self.order[group] for group in groups)
        return heapq.merge(
            *(self.order[group] for group in groups), key=partial(self._rank, self.owner[atom])
        )

    def _rank(self, owner: int, request: Request) -> tuple[float, float, int]:
        factor = 1.0 if request.group == owner else self.yield_factor or 1.0
        return self.sizes[request.job] * factor, request.opened_s, request.job
