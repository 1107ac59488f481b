"""Which cohort a granted device trains: its best one, sometimes another, never more than fit.

Late binding: devices come one by one and in no order, so every rule here can place a single device.
All cohorts of a job share one stream of devices; separate streams would compete with each other,
and small cohorts would starve.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from raysys.federated.core.randomness import Purpose, hashed

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
SMALL_GAP = 0.1
DECLINED = -1
GATHER = 0.8


@dataclasses.dataclass(slots=True)
class Quotas:
    """Places of each leaf in the open round, and how many devices are still to be offered.

    Args:
        places: by leaf; demand: devices wanted in all; offers: devices that will be shown.
    """

    places: dict[int, int]
    demand: int
    offers: int
    placed: dict[int, int] = dataclasses.field(default_factory=dict)
    seen: int = 0

    @property
    def total(self) -> int:
        """Devices placed so far."""
        return sum(self.placed.values())

    def take_any(self, cohort: int) -> int:
        """Place a device outside the leaves, if the demand has room for it."""
        self.seen += 1
        if self.total >= self.demand:
            return DECLINED
        self.placed[cohort] = self.placed.get(cohort, 0) + 1
        return cohort

    def take(self, first: int, second: int, gap: float) -> int:
        """Leaf for one device, or DECLINED.

        A full leaf hands over to the second choice if that is nearly as good. Places that would
        otherwise stay empty are given away once so few offers are left that none may be declined.
        """
        remaining = self.offers - self.seen
        self.seen += 1
        if self.total >= self.demand:
            return DECLINED
        chosen = DECLINED
        if self._free(first):
            chosen = first
        elif second != first and gap < SMALL_GAP and self._free(second):
            chosen = second
        elif remaining <= self.demand - self.total:
            chosen = first
        if chosen != DECLINED:
            self.placed[chosen] = self.placed.get(chosen, 0) + 1
        return chosen

    def _free(self, leaf: int) -> bool:
        return self.placed.get(leaf, 0) < self.places.get(leaf, self.demand)


def make_quotas(
    active: dict[int, float], demand: int, p_min: int, budget: str, population: int
) -> Quotas:
    """Share the devices of a round among leaves.

    Args:
        active: members of each leaf. budget: "sqrt", "equal" or "arrivals".

    Small leaves get more than their share of the clients, so devices beyond the demand are offered
    and declined before they train: as many as fill the neediest leaf, at most once the demand.
    """
    if len(active) == 1 or budget == "arrivals":
        return Quotas(dict.fromkeys(active, demand), demand, demand)
    power = 0.5 if budget == "sqrt" else 0.0
    wish = {leaf: max(n, 1.0) ** power for leaf, n in active.items()}
    floor = min(p_min, demand // len(active))
    spare = demand - floor * len(active)
    total = sum(wish.values())
    places = {leaf: floor + int(spare * w / total) for leaf, w in wish.items()}
    for leaf in sorted(places, key=lambda q: (-wish[q], q))[: demand - sum(places.values())]:
        places[leaf] += 1
    members = max(sum(active.values()), 1.0)
    needed = max(places[leaf] * members / max(n, 1.0) for leaf, n in active.items())
    offers = min(max(demand, math.ceil(needed)), 2 * demand, population)
    return Quotas(places, demand, offers)


def rank_leaves(
    rewards_kQ: FloatArray,
    explore_k: FloatArray,
    nursery_k: IntArray,
    homeless_k: BoolArray,
    clients_k: IntArray,
    seed: int,
    round_id: int,
) -> tuple[IntArray, IntArray, FloatArray]:
    """First and second choice of each client among Q leaves, and the gap between them.

    Args:
        rewards_kQ: rewards of the leaves. explore_k: probability that the client explores.
        nursery_k: place of the leaf where each client goes if no leaf wants it. homeless_k: whom
            no leaf wants.

    Exploring, a client takes the least bad of the other leaves; ties are broken at random. A client
    without any evidence has only ties, so it goes to a random leaf. A fifth of the homeless go on
    looking.
    """
    k, q = rewards_kQ.shape
    leaf = np.arange(q)[None, :]
    noise = _uniform(hashed(seed, Purpose.SCHEDULE, round_id, clients_k[:, None], leaf + 1))
    scores = rewards_kQ + 1e-9 * noise
    best = scores.argmax(axis=1)
    lucky = _uniform(hashed(seed, Purpose.SCHEDULE, round_id, clients_k, 0)) < explore_k
    rows = np.arange(k)
    if q > 1:
        others = scores.copy()
        others[rows, best] = -np.inf
        second = others.argmax(axis=1)
    else:
        second = best
    first = np.where(lucky, second, best)
    gather = homeless_k & (
        _uniform(hashed(seed, Purpose.SCHEDULE, clients_k, round_id, 1)) < GATHER
    )
    first = np.where(gather, nursery_k, first)
    second = np.where(lucky | gather, best, second)
    return first, second, np.abs(scores[rows, first] - scores[rows, second])


def _uniform(raw: npt.NDArray[np.uint64]) -> FloatArray:
    return (raw >> np.uint64(11)).astype(np.float64) / 2.0**53
