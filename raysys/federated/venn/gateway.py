"""A gateway's part: eligibility, assignment from credits, leases, usage. It never plans.

Pure: time comes with every call. One object per gateway incarnation; a restart is a new one, with
empty leases, and the scheduler charges what the old one may have done until its leases end.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_range
from raysys.errors import ConfigError
from raysys.federated.venn.assignment import assign
from raysys.federated.venn.leases import Lease, LeaseTable
from raysys.federated.venn.pacing import jittered
from raysys.federated.venn.requirements import Requirement, RequirementCompiler, Schema

DEVICE_ID_BYTES = 16
NO_TASK, RATE_LIMITED, WRONG_GATEWAY = -1, -2, -3
DONE, DECLINED, FAILED = 0, 1, 2

Ints = npt.NDArray[np.int64]


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
    """An open round as the gateway knows it; counters are cumulative over this incarnation."""

    round_id: int
    slot: int
    group: int
    limit: int
    version: int
    lease_s: float
    ends_s: float
    size: float = 0.0
    spent: int = 0
    done: int = 0
    failed: int = 0
    task: object = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayPlan:
    """A plan as a gateway receives it; ``rounds`` in service order."""

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


@dataclass(frozen=True, slots=True)
class Offers:
    """Answer to a batch of N check-ins.

    Args:
        slots: int32, job slot or one of the negative codes; leases: uint64, 0 without a task.
        expiry_s: float32, seconds from now; retry_s: float32, 0 with a task.
        rounds: rounds that occur in the answer.
    """

    slots: npt.NDArray[np.int32]
    leases: npt.NDArray[np.uint64]
    expiry_s: npt.NDArray[np.float32]
    retry_s: npt.NDArray[np.float32]
    rounds: list[GatewayRound]


@dataclass(slots=True)
class GatewayCore:
    """State of one gateway incarnation."""

    name: str
    incarnation: int
    config: GatewayConfig = field(default_factory=GatewayConfig)
    rounds: dict[int, GatewayRound] = field(default_factory=dict)
    leases: LeaseTable = field(default_factory=LeaseTable)
    counts: dict[int, int] = field(default_factory=dict)
    plan: GatewayPlan | None = None
    heard_s: float = -np.inf
    _compiler: RequirementCompiler | None = None
    _rankings: dict[int, list[int]] = field(default_factory=dict)
    _last_seen: dict[bytes, float] = field(default_factory=dict)
    _older_seen: dict[bytes, float] = field(default_factory=dict)
    _rotated_s: float = 0.0
    _generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng((self.config.seed, self.incarnation))

    def adopt(self, plan: GatewayPlan) -> None:
        """Take over a plan: limits may fall to what is spent already, never below."""
        rounds: dict[int, GatewayRound] = {}
        for new in plan.rounds:
            old = self.rounds.get(new.round_id)
            if old is not None:
                new.spent, new.done, new.failed = old.spent, old.done, old.failed
            new.limit = max(new.limit, new.spent)
            rounds[new.round_id] = new
        self.rounds = rounds
        if self._compiler is None or self._compiler.requirements() != plan.requirements:
            self._compiler = RequirementCompiler(plan.schema)
            for requirement in plan.requirements:
                self._compiler.add(requirement)
        self.plan = plan
        self._rankings = {}

    def heard(self, now_s: float) -> None:
        """The scheduler answered a message that was *sent* at ``now_s``."""
        self.heard_s = max(self.heard_s, now_s)

    def fenced(self, now_s: float) -> bool:
        """Whether the scheduler may think this gateway dead."""
        return now_s - self.heard_s > self.config.fence_s

    def check_in(self, ids: bytes, columns: Sequence[bytes], now_s: float) -> Offers:
        """Answer a batch of devices.

        Args:
            ids: N device ids of 16 bytes each.
            columns: N float32 values per attribute, little-endian.

        Raises:
            ConfigError: malformed batch; nothing was assigned.
        """
        devices = self._devices(ids)
        names = self._attributes()
        if len(columns) != len(names):
            raise ConfigError("columns", len(columns), f"{len(names)} columns")
        values = [_floats(name, column) for name, column in zip(names, columns)]
        if any(len(value) != len(devices) for value in values):
            lengths = [len(value) for value in values]
            raise ConfigError("columns", lengths, f"{len(devices)} values in every column")
        assert self._compiler is not None
        masks, atom_of = self._compiler.masks(values)
        self.tick(now_s)
        offers = self._blank(len(devices))
        fresh = self._screen(devices, ids, offers, now_s)
        for index, count in enumerate(np.bincount(atom_of, minlength=len(masks)).tolist()):
            self.counts[masks[index]] = self.counts.get(masks[index], 0) + count
        if self.fenced(now_s):
            fresh = fresh[:0]
        chosen = self._choose(masks, atom_of[fresh])
        for place, round_id in zip(fresh.tolist(), chosen.tolist()):
            if round_id >= 0:
                self._lease(devices[place], place, self.rounds[round_id], offers, now_s)
        self._repeat(devices, offers, now_s)
        return offers

    def renew(self, counters: Sequence[int], now_s: float) -> list[float]:
        """Prolong leases; seconds left of each, 0 for one that is unknown or expired."""
        left = []
        for counter in counters:
            held = self.leases.leases.get(counter)
            entry = self.rounds.get(held.round_id) if held is not None else None
            live = entry is not None and not self.fenced(now_s)
            lease = self.leases.renew(counter, now_s, entry.lease_s) if live and entry else None
            left.append(lease.expires_s - now_s if lease is not None else 0.0)
        return left

    def release(self, counters: Sequence[int], outcomes: Sequence[int], now_s: float) -> list[bool]:
        """End leases as done, declined or failed; False for one that is unknown or expired.

        Raises:
            ConfigError: unequal lengths, or an unknown outcome; nothing was released.
        """
        if len(counters) != len(outcomes):
            raise ConfigError("outcomes", len(outcomes), f"{len(counters)} values")
        if any(not 0 <= outcome <= FAILED for outcome in outcomes):
            raise ConfigError("outcomes", max(outcomes), "0 done, 1 declined or 2 failed")
        self.tick(now_s)
        accepted = []
        for counter, outcome in zip(counters, outcomes):
            lease = self.leases.release(counter, now_s)
            accepted.append(lease is not None)
            if lease is not None:
                self._settle(lease, outcome == DONE)
        return accepted

    def tick(self, now_s: float) -> int:
        """Count leases that ran out as failed devices; how many they were."""
        expired = self.leases.expire(now_s)
        for lease in expired:
            self._settle(lease, done=False)
        return len(expired)

    def usage(self) -> tuple[list[list[int]], dict[int, int]]:
        """Cumulative rows ``[round, spent, done, failed, limit, version]``, check-ins by mask.

        The check-ins are counted from the last call on.
        """
        rows = [
            [item.round_id, item.spent, item.done, item.failed, item.limit, item.version]
            for item in self.rounds.values()
        ]
        counts, self.counts = self.counts, {}
        return rows, counts

    def _attributes(self) -> tuple[str, ...]:
        if self.plan is None:
            raise ConfigError("gateway", self.name, "a plan", "It has none yet; try again soon")
        return self.plan.schema.attributes

    def _devices(self, ids: bytes) -> list[bytes]:
        if len(ids) % DEVICE_ID_BYTES:
            raise ConfigError("device_ids", len(ids), f"a multiple of {DEVICE_ID_BYTES} bytes")
        count = len(ids) // DEVICE_ID_BYTES
        if not 1 <= count <= self.config.max_batch:
            raise ConfigError("device_ids", count, f"1 to {self.config.max_batch} devices")
        found: list[bytes] = np.frombuffer(ids, dtype="V16").tolist()
        return found

    def _blank(self, count: int) -> Offers:
        assert self.plan is not None
        return Offers(
            np.full(count, NO_TASK, dtype=np.int32),
            np.zeros(count, dtype=np.uint64),
            np.zeros(count, dtype=np.float32),
            jittered(self.plan.retry_after_s, count, self._generator),
            [],
        )

    def _screen(self, devices: list[bytes], ids: bytes, offers: Offers, now_s: float) -> Ints:
        """Places of the devices that may get a new lease; marks the refused ones."""
        allowed = np.ones(len(devices), dtype=bool)
        if self.config.shards > 1:
            words = np.frombuffer(ids, dtype="<u8")[::2]
            wrong = words % np.uint64(self.config.shards) != self.config.shard
            offers.slots[wrong] = WRONG_GATEWAY
            allowed &= ~wrong
        if self.config.min_interval_s:
            limited = self._rate_limited(devices, now_s)
            offers.slots[limited & allowed] = RATE_LIMITED
            allowed &= ~limited
        if len(set(devices)) != len(devices):
            first = {device: place for place, device in reversed(list(enumerate(devices)))}
            for place, device in enumerate(devices):
                if first[device] != place:
                    allowed[place] = False
        held = self.leases.by_device
        if held:
            allowed[[place for place, device in enumerate(devices) if device in held]] = False
        return np.flatnonzero(allowed)

    def _rate_limited(self, devices: list[bytes], now_s: float) -> npt.NDArray[np.bool_]:
        """Exact last times in two generations, so that memory stays bounded by two intervals."""
        interval_s = self.config.min_interval_s
        if now_s - self._rotated_s > interval_s:
            self._older_seen, self._last_seen = self._last_seen, {}
            self._rotated_s = now_s
        limited = np.zeros(len(devices), dtype=bool)
        recent, older, floor = self._last_seen, self._older_seen, now_s - interval_s
        for place, device in enumerate(devices):
            last = recent.get(device)
            if last is None:
                last = older.get(device, -np.inf)
            if last > floor:
                limited[place] = device not in self.leases.by_device
            else:
                recent[device] = now_s
        return limited

    def _choose(self, masks: list[int], atom_of: Ints) -> Ints:
        credits = {item.round_id: item.limit - item.spent for item in self.rounds.values()}
        if not any(credits.values()):
            return np.full(len(atom_of), -1, dtype=np.int64)
        return assign(atom_of, lambda atom: self._ranking(masks[atom]), credits)

    def _ranking(self, mask: int) -> list[int]:
        found = self._rankings.get(mask)
        if found is None:
            found = self._rankings[mask] = self._rank(mask)
        return found

    def _rank(self, mask: int) -> list[int]:
        plan = self.plan
        assert plan is not None
        eligible = [item for item in plan.rounds if mask >> item.group & 1]
        if plan.flat:
            return [item.round_id for item in eligible]
        fallback = [group for group in plan.scarcity if mask >> group & 1]
        groups = list(plan.atoms.get(mask, fallback))
        by_group: dict[int, list[GatewayRound]] = {group: [] for group in groups}
        for item in eligible:
            by_group.setdefault(item.group, []).append(item)
        if plan.yield_factor is None or not groups:
            return [item.round_id for members in by_group.values() for item in members]
        factor = dict.fromkeys(by_group, plan.yield_factor) | {groups[0]: 1.0}
        merged = heapq.merge(*by_group.values(), key=lambda item: item.size * factor[item.group])
        return [item.round_id for item in merged]

    def _lease(
        self, device: bytes, place: int, entry: GatewayRound, offers: Offers, now_s: float
    ) -> None:
        if entry.ends_s <= now_s:
            return
        lease = self.leases.issue(device, entry.round_id, now_s, entry.lease_s, entry.ends_s)
        entry.spent += 1
        self._offer(place, lease, entry, offers, now_s)

    def _repeat(self, devices: list[bytes], offers: Offers, now_s: float) -> None:
        """A device that holds a lease already gets the same one again."""
        if not self.leases.by_device:
            return
        for place in np.flatnonzero(offers.slots == NO_TASK).tolist():
            lease = self.leases.of_device(devices[place], now_s)
            entry = self.rounds.get(lease.round_id) if lease is not None else None
            if lease is not None and entry is not None:
                self._offer(place, lease, entry, offers, now_s)

    def _offer(
        self, place: int, lease: Lease, entry: GatewayRound, offers: Offers, now_s: float
    ) -> None:
        offers.slots[place] = entry.slot
        offers.leases[place] = lease.counter
        offers.expiry_s[place] = lease.expires_s - now_s
        offers.retry_s[place] = 0.0
        if entry not in offers.rounds:
            offers.rounds.append(entry)

    def _settle(self, lease: Lease, done: bool) -> None:
        entry = self.rounds.get(lease.round_id)
        if entry is not None and done:
            entry.done += 1
        elif entry is not None:
            entry.failed += 1


def _floats(name: str, column: bytes) -> npt.NDArray[np.float32]:
    if len(column) % 4:
        raise ConfigError(f"columns.{name}", len(column), "a multiple of 4 bytes (float32)")
    return np.frombuffer(column, dtype="<f4")
