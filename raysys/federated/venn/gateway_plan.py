"""What a gateway is told and what it answers: its settings, the plan, and the offers of a batch."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_range
from raysys.federated.venn.requests import ALL_CLASSES
from raysys.federated.venn.requirements import Requirement, Schema


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Settings of a gateway.

    Args:
        shards, shard: devices are split by id; an id of another shard is refused. 1 accepts all.
        min_interval_s: a device may check in once per so many seconds; 0 for no limit.
        max_batch: most check-ins in one message.
        fence_s: without a sign of the scheduler for so long, no lease is issued or prolonged: the
            scheduler may have given this gateway up and will hand its credits to others.
        seed: of the jitter.
    """

    shards: int = 1
    shard: int = 0
    min_interval_s: float = 0.0
    max_batch: int = 100_000
    fence_s: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "shards", 1)
        check(self, "shard", 0 <= self.shard < self.shards, f"a number in [0, {self.shards})")
        check_range(self, "min_interval_s", 0)
        check_range(self, "max_batch", 1)
        check_range(self, "fence_s", 0, low_open=True)


@dataclass(slots=True)
class GatewayRound:
    """An open round as the gateway knows it; counters are cumulative over this incarnation.

    ``classes`` is the bitset of capability classes that the round accepts, -1 for all.
    """

    round_id: int
    slot: int
    group: int
    limit: int
    version: int
    lease_s: float
    ends_s: float
    size: float = 0.0
    classes: int = ALL_CLASSES
    spent: int = 0
    done: int = 0
    failed: int = 0
    task: object = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayPlan:
    """A plan as a gateway receives it; ``rounds`` in service order.

    With ``tiered`` the gateway tells devices' capability classes apart and profiles their answers.
    """

    epoch: int
    version: int
    schema: Schema
    requirements: tuple[Requirement, ...]
    rounds: tuple[GatewayRound, ...]
    atoms: Mapping[int, Sequence[int]]
    scarcity: Sequence[int] = ()
    flat: bool = False
    yield_factor: float | None = None
    retry_after_s: float = 900.0
    tiered: bool = False

    def ranking(self, mask: int, capability: int) -> list[int]:
        """Ids of the rounds that a device of this mask and class is offered to, in order."""
        eligible = [
            item
            for item in self.rounds
            if mask >> item.group & 1 and item.classes >> capability & 1
        ]
        if self.flat:
            return [item.round_id for item in eligible]
        fallback = [group for group in self.scarcity if mask >> group & 1]
        groups = list(self.atoms.get(mask, fallback))
        by_group: dict[int, list[GatewayRound]] = {group: [] for group in groups}
        for item in eligible:
            by_group.setdefault(item.group, []).append(item)
        if self.yield_factor is None or not groups:
            return [item.round_id for members in by_group.values() for item in members]
        factor = dict.fromkeys(by_group, self.yield_factor) | {groups[0]: 1.0}
        merged = heapq.merge(*by_group.values(), key=lambda item: item.size * factor[item.group])
        return [item.round_id for item in merged]


@dataclass(frozen=True, slots=True)
class Offers:
    """Answer to a batch of N check-ins.

    Args:
        slots: int32, job slot or one of the negative codes; leases: uint64, 0 without a task.
        expiry_s: float32, seconds from now; retry_s: float32, 0 with a task.
        rounds: rounds that occur in the answer, by id.
    """

    slots: npt.NDArray[np.int32]
    leases: npt.NDArray[np.uint64]
    expiry_s: npt.NDArray[np.float32]
    retry_s: npt.NDArray[np.float32]
    rounds: dict[int, GatewayRound] = field(default_factory=dict)


@dataclass(slots=True)
class Usage:
    """What a gateway reports.

    Args:
        rounds: cumulative rows ``[round, spent, done, failed, limit, version]``.
        checkins: check-ins by mask since the last report.
        answers: by round, capability class and response time in seconds of the devices that
            finished since the last report; only while the plan is tiered.
    """

    rounds: list[list[int]]
    checkins: dict[int, int]
    answers: dict[int, list[tuple[int, float]]]
