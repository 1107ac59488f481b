"""The scheduler's state as plain data, so that a snapshot is one JSON document."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from raysys.config import check, check_range
from raysys.federated.venn.capability import CLASSES
from raysys.federated.venn.credits import Grant
from raysys.federated.venn.requests import ALL_CLASSES
from raysys.federated.venn.requirements import Requirement, Schema
from raysys.federated.venn.supply import SupplyConfig, SupplyEstimator

RECENT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """Settings of the live service.

    Args:
        schema: attribute columns of a check-in.
        supply: estimator of the rates.
        policy: name in :data:`raysys.federated.venn.scheduler.POLICIES`.
        eps: starvation knob of the IRS policies.
        tiers: tiers of tier matching, for devices that tell their speed; 1 switches it off.
        report_interval_s: gateways report this often.
        replan_interval_s: a plan is made at least this often, to follow the supply.
        debounce_s: job events within this time are planned at once.
        rebalance_s: credits that a gateway does not use for so long go to others.
        gateway_timeout_s: a gateway silent for so long is dead.
        fence_s: a gateway that hears nothing stops by itself after this time (the same value in
            :class:`~raysys.federated.venn.gateway.GatewayConfig`).
        job_max_silent_s, job_max_life_s: a job silent or alive for longer is removed.
        max_demand: largest demand of one round.
        low_retry_s, high_retry_s: bounds of pace steering.
    """

    schema: Schema = field(default_factory=Schema)
    supply: SupplyConfig = field(default_factory=SupplyConfig)
    policy: str = "irs-yield"
    eps: float = 0.0
    tiers: int = 1
    report_interval_s: float = 0.1
    replan_interval_s: float = 60.0
    debounce_s: float = 0.02
    rebalance_s: float = 0.5
    gateway_timeout_s: float = 3.0
    fence_s: float = 10.0
    job_max_silent_s: float = 1800.0
    job_max_life_s: float = 7 * 86_400.0
    max_demand: int = 10_000_000
    low_retry_s: float = 60.0
    high_retry_s: float = 900.0

    def __post_init__(self) -> None:
        check_range(self, "eps", 0)
        check_range(self, "tiers", 1, CLASSES)
        check_range(self, "report_interval_s", 0, low_open=True)
        check_range(self, "replan_interval_s", 0, low_open=True)
        check_range(self, "debounce_s", 0)
        check_range(self, "rebalance_s", 0, low_open=True)
        check_range(self, "gateway_timeout_s", self.report_interval_s, low_open=True)
        check_range(self, "fence_s", 0, low_open=True)
        check_range(self, "job_max_silent_s", 0, low_open=True)
        check_range(self, "job_max_life_s", 0, low_open=True)
        check_range(self, "max_demand", 1)
        check_range(self, "low_retry_s", 0)
        check(self, "high_retry_s", self.high_retry_s >= self.low_retry_s, ">= low_retry_s")


@dataclass(slots=True)
class LostGrant:
    """What a dead gateway may have assigned to a round, and when all of that is over.

    ``unknown`` devices were never reported; ``live`` ones had leases at the last report.
    """

    gateway: str
    back_s: float
    unknown: int
    live: int


@dataclass(slots=True)
class RoundState:
    """One open round; ``extra`` counts devices that the job asked for on top.

    ``classes`` are the capability classes that it accepts; ``answers`` holds class and response
    time of devices that finished, as far as they were profiled. ``lost`` are ceilings and live
    leases of dead gateways: they stay charged until ``returns`` says that the leases behind them
    have run out.
    """

    round_id: int
    number: int
    demand: int
    overcommit: float
    deadline_s: float
    opened_s: float
    lease_s: float
    replace_failed: bool = True
    extra: int = 0
    expired: bool = False
    filled: bool = False
    unsatisfiable: bool = False
    grants: dict[str, Grant] = field(default_factory=dict)
    settled_spent: int = 0
    settled_failed: int = 0
    lost: int = 0
    returns: list[LostGrant] = field(default_factory=list)
    classes: int = ALL_CLASSES
    filled_s: float = 0.0
    answers: list[tuple[int, float]] = field(default_factory=list)

    @property
    def allowed(self) -> int:
        """Devices that may ever be assigned, replacements included."""
        base = math.ceil(self.demand * self.overcommit - 1e-9) + self.extra
        return base + (self.failed if self.replace_failed else 0)

    @property
    def spent(self) -> int:
        """Devices known to be assigned."""
        return self.settled_spent + sum(grant.spent for grant in self.grants.values())

    @property
    def failed(self) -> int:
        return self.settled_failed + sum(grant.failed for grant in self.grants.values())

    @property
    def charged(self) -> int:
        """Devices that may have been assigned for all the scheduler knows."""
        return self.settled_spent + self.lost + sum(g.ceiling for g in self.grants.values())

    @property
    def remaining(self) -> int:
        """Devices still to be assigned."""
        return 0 if self.expired else max(self.allowed - self.spent - self.lost, 0)

    def due(self, now_s: float) -> bool:
        """Whether its deadline has passed, or leases of dead gateways have run out."""
        late = not self.expired and now_s >= self.opened_s + self.deadline_s
        return late or any(entry.back_s <= now_s for entry in self.returns)


@dataclass(slots=True)
class JobState:
    """A registered job; ``nominal_s`` is the task time that it declared, 0 if it did not."""

    job_id: str
    slot: int
    group: int
    registered_s: float
    seen_s: float
    rounds: int = 0
    response_s: float = 90.0
    nominal_s: float = 0.0
    plan_uri: str = ""
    upload_endpoint: str = ""
    rounds_done: int = 0
    rounds_aborted: int = 0
    round_opened_s: float = 0.0
    attempts: int = 0
    assigned: int = 0
    failed: int = 0
    open: RoundState | None = None


@dataclass(slots=True)
class GatewayState:
    """A gateway as the scheduler knows it; ``recent`` counts check-ins, fading over seconds."""

    incarnation: int
    sequence: int = 0
    recent: float = 0.0
    counted_s: float = 0.0

    def recent_at(self, now_s: float) -> float:
        """The fading count at a time; idle gateways lose their share."""
        return self.recent * math.exp(-max(now_s - self.counted_s, 0.0) / RECENT_S)


@dataclass(slots=True)
class SchedulerState:
    """Everything that a restart must bring back."""

    epoch: int = 0
    version: int = 0
    next_slot: int = 0
    next_round: int = 1
    seed: int = 0
    requirements: list[Requirement] = field(default_factory=list)
    jobs: dict[str, JobState] = field(default_factory=dict)
    gateways: dict[str, GatewayState] = field(default_factory=dict)
    supply: SupplyEstimator = field(default_factory=SupplyEstimator)
    masks: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    atoms: list[tuple[int, list[int]]] = field(default_factory=list)
    scarcity: list[int] = field(default_factory=list)
    flat: bool = False
    sizes: dict[int, float] = field(default_factory=dict)
    yield_factor: float | None = None
    retry_after_s: float = 900.0
    tiers: dict[str, Any] = field(default_factory=dict)
    dirty: bool = False
