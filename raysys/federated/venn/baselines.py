"""The schedulers that Venn is compared with; same interface, same care.

Random (optimised) gives every request one random priority (paper, section 5.1); random per device
draws anew for every device. FIFO and shortest remaining demand come in two forms. Least attained
service, round robin and a static partition of the population complete the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raysys.federated.venn.requests import OrderedPlan, Request
from raysys.federated.venn.supply import SupplyView

Key = Callable[[Request], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class _ByKey:
    key: Key

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> OrderedPlan:
        waiting = [request for request in requests if request.remaining > 0]
        waiting.sort(key=self.key)
        return OrderedPlan(waiting, supply.masks)


def random_per_request() -> _ByKey:
    """Optimised random matching: the draw of the request decides, until it is filled."""
    return _ByKey(lambda request: (request.priority, request.job))


def fifo() -> _ByKey:
    """Jobs in the order of their registration."""
    return _ByKey(lambda request: (request.registered_s, request.job))


def fifo_by_request() -> _ByKey:
    """Requests in the order in which they were opened."""
    return _ByKey(lambda request: (request.opened_s, request.job))


def srsf() -> _ByKey:
    """Smallest remaining demand of the open round first, blind to scarcity."""
    return _ByKey(lambda request: (request.remaining, request.opened_s, request.job))


def srsf_total() -> _ByKey:
    """Smallest remaining demand over all coming rounds first."""
    return _ByKey(lambda request: (request.total_remaining(), request.opened_s, request.job))


def least_attained() -> _ByKey:
    """The job with the fewest devices in its finished rounds goes first.

    Only finished rounds count: were every assigned device counted at once, equal jobs would take
    turns device by device, miss their deadlines together, and never finish a round.
    """
    return _ByKey(lambda request: (request.attained(), request.opened_s, request.job))


def round_robin() -> _ByKey:
    """The job with the fewest finished rounds goes first, then the oldest request."""
    return _ByKey(lambda request: (request.rounds_done, request.opened_s, request.job))


class RandomPerDevice:
    """Marker: every device draws one of its eligible open requests uniformly.

    The order is by job; the simulators and the gateway rotate it per device.
    """

    per_device = True

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> OrderedPlan:
        waiting = [request for request in requests if request.remaining > 0]
        waiting.sort(key=lambda request: request.job)
        return OrderedPlan(waiting, supply.masks)


@dataclass(frozen=True, slots=True)
class StaticPartition:
    """The population is cut into equal parts; job i is served from part ``i mod parts`` only.

    Parts are capability classes drawn at random per device by the caller (class index = part).
    """

    parts: int

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> OrderedPlan:
        waiting = [request for request in requests if request.remaining > 0]
        waiting.sort(key=lambda request: (request.registered_s, request.job))
        for request in waiting:
            request.classes = 1 << request.job % self.parts
        return OrderedPlan(waiting, supply.masks)
