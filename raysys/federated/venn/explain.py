"""Why does a job wait? Position, group, pressure, expected fill time, and who owns which atoms."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from raysys.federated.venn.requests import GroupedPlan, Request
from raysys.federated.venn.supply import TINY_RATE, SupplyView


@dataclass(frozen=True, slots=True)
class AtomShare:
    """One kind of device that the job could use: its rate, and the group that owns it."""

    mask: int
    rate: float
    owner: int


@dataclass(frozen=True, slots=True)
class WhyReport:
    """Explanation of one open request; times in seconds, rates in devices per second.

    Args:
        position: place within its group, 0 is next; ahead: devices wanted by those before it.
        supply: rate of eligible devices; allocated: rate that its group owns.
        pressure: waiting jobs of the group per allocated rate.
        expected_fill_s: time until its demand is met if the plan stays; infinite without supply.
    """

    job: int
    group: int
    position: int
    ahead: int
    supply: float
    allocated: float
    pressure: float
    expected_fill_s: float
    atoms: tuple[AtomShare, ...]

    def to_dict(self) -> dict[str, object]:
        """Nested plain values."""
        return asdict(self)


def why(plan: GroupedPlan, request: Request, view: SupplyView) -> WhyReport:
    """Explain the place of ``request`` in ``plan``."""
    order = plan.order[request.group]
    position = next(i for i, item in enumerate(order) if item.job == request.job)
    ahead = sum(item.remaining for item in order[:position])
    allocated = plan.allocated.get(request.group, 0.0)
    wanted = ahead + request.remaining
    return WhyReport(
        job=request.job,
        group=request.group,
        position=position,
        ahead=ahead,
        supply=view.group_rates[request.group],
        allocated=allocated,
        pressure=len(order) / max(allocated, TINY_RATE),
        expected_fill_s=wanted / allocated if allocated > TINY_RATE else float("inf"),
        atoms=tuple(
            AtomShare(mask, rate, owner)
            for mask, rate, owner in zip(view.masks, view.rates, plan.owner)
            if mask >> request.group & 1
        ),
    )
