"""A gateway's part: eligibility, assignment from credits, leases, usage. It never plans.

Pure: time comes with every call. One object per gateway incarnation; a restart is a new one, with
empty leases, and the scheduler charges what the old one may have done until its leases end. A batch
is handled in columns; Python objects are made per round and per kind of device, not per device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.venn.assignment import assign
from raysys.federated.venn.capability import CLASSES, UNKNOWN, capability_classes
from raysys.federated.venn.gateway_plan import (
    GatewayConfig,
    GatewayPlan,
    GatewayRound,
    Offers,
    Usage,
)
from raysys.federated.venn.leases import Counters, Floats, Ints, LeaseTable
from raysys.federated.venn.pacing import jittered
from raysys.federated.venn.requirements import RequirementCompiler

DEVICE_ID_BYTES = 16
NO_TASK, RATE_LIMITED, WRONG_GATEWAY = -1, -2, -3
DONE, DECLINED, FAILED = 0, 1, 2
_KINDS = CLASSES + 1
_KEPT_ANSWERS = 512

Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class GatewayCore:
    """State of one gateway incarnation."""

    name: str
    incarnation: int
    config: GatewayConfig = field(default_factory=GatewayConfig)
    rounds: dict[int, GatewayRound] = field(default_factory=dict)
    leases: LeaseTable = field(default_factory=LeaseTable)
    counts: dict[int, int] = field(default_factory=dict)
    answers: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    plan: GatewayPlan | None = None
    heard_s: float = -np.inf
    _compiler: RequirementCompiler | None = None
    _credits: dict[int, int] = field(default_factory=dict)
    _next_end_s: float = np.inf
    _rankings: dict[tuple[int, int], deque[int]] = field(default_factory=dict)
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
        self._next_end_s = -np.inf

    def heard(self, now_s: float) -> None:
        """The scheduler answered a message that was *sent* at ``now_s``."""
        self.heard_s = max(self.heard_s, now_s)

    def fenced(self, now_s: float) -> bool:
        """Whether the scheduler may think this gateway dead."""
        return now_s - self.heard_s > self.config.fence_s

    def check_in(
        self,
        ids: bytes,
        columns: Sequence[bytes],
        now_s: float,
        compute: bytes = b"",
        bandwidth: bytes = b"",
    ) -> Offers:
        """Answer a batch of devices.

        Args:
            ids: N device ids of 16 bytes each.
            columns: N float32 values per attribute, little-endian.
            compute, bandwidth: N float32 values each, or empty; see
                :func:`~raysys.federated.venn.capability.capability_classes`.

        Raises:
            ConfigError: malformed batch; nothing was assigned.
        """
        devices = self._devices(ids)
        names = self._attributes()
        if len(columns) != len(names):
            raise ConfigError("columns", len(columns), f"{len(names)} columns")
        values = [_floats(f"columns.{name}", column) for name, column in zip(names, columns)]
        if any(len(value) != len(devices) for value in values):
            lengths = [len(value) for value in values]
            raise ConfigError("columns", lengths, f"{len(devices)} values in every column")
        capability = _capability(compute, bandwidth, len(devices))
        assert self._compiler is not None
        masks, atom_of = self._compiler.masks(values)
        self.tick(now_s)
        offers = self._blank(len(devices))
        fresh, again = self._screen(devices, ids, offers, now_s)
        for index, count in enumerate(np.bincount(atom_of, minlength=len(masks)).tolist()):
            self.counts[masks[index]] = self.counts.get(masks[index], 0) + count
        if len(fresh) and not self.fenced(now_s):
            chosen = self._choose(masks, atom_of[fresh], capability[fresh], now_s)
            given = chosen >= 0
            self._lease(devices, fresh[given], chosen[given], capability, offers, now_s)
        self._repeat(devices, again, offers, now_s)
        return offers

    def renew(self, counters: Counters, now_s: float) -> Floats:
        """Prolong leases; seconds left of each, 0 for one that is unknown or expired."""
        left = np.zeros(len(counters))
        if self.fenced(now_s):
            return left
        rows = self.leases.rows(counters, now_s)
        places = np.flatnonzero(rows >= 0)
        round_ids = self.leases.round_id[rows[places]]
        places = places[np.isin(round_ids, list(self.rounds))]
        if len(places):
            live = rows[places]
            found, inverse = np.unique(self.leases.round_id[live], return_inverse=True)
            spans_s = np.asarray([self.rounds[item].lease_s for item in found.tolist()])
            left[places] = self.leases.prolong(live, now_s, spans_s[inverse]) - now_s
        return left

    def holders(self, counters: Counters, now_s: float) -> dict[int, tuple[bytes, GatewayRound]]:
        """Device and round of those leases that are live, by their place in ``counters``."""
        rows = self.leases.rows(counters, now_s)
        places = np.flatnonzero(rows >= 0)
        devices = self.leases.devices(rows[places])
        found = zip(places.tolist(), devices, self.leases.round_id[rows[places]].tolist())
        return {p: (d, self.rounds[r]) for p, d, r in found if r in self.rounds}

    def release(self, counters: Counters, outcomes: bytes, now_s: float) -> Bools:
        """End leases as done, declined or failed; False for one that is unknown or expired.

        Args:
            counters: uint64, length N; outcomes: one byte each.

        Raises:
            ConfigError: unequal lengths, or an unknown outcome; nothing was released.
        """
        result = np.frombuffer(outcomes, dtype=np.uint8)
        if len(counters) != len(result):
            raise ConfigError("outcomes", len(result), f"{len(counters)} values")
        if len(result) and result.max() > FAILED:
            raise ConfigError("outcomes", int(result.max()), "0 done, 1 declined or 2 failed")
        self.tick(now_s)
        rows = self.leases.rows(counters, now_s)
        distinct, first = np.unique(rows, return_index=True)
        first = first[distinct >= 0]
        accepted = np.zeros(len(rows), dtype=np.bool_)
        accepted[first] = True
        ended = rows[first]
        done = result[first] == DONE
        self._settle(self.leases.round_id[ended[done]], done=True)
        self._settle(self.leases.round_id[ended[~done]], done=False)
        if self.plan is not None and self.plan.tiered:
            self._profile(ended[done], now_s)
        self.leases.drop(ended)
        return accepted

    def tick(self, now_s: float) -> int:
        """Count leases that ran out as failed devices; how many they were."""
        expired = self.leases.expire(now_s)
        self._settle(expired, done=False)
        return len(expired)

    def usage(self) -> Usage:
        """What to report; check-ins and answers are counted from the last call on."""
        rows = [
            [item.round_id, item.spent, item.done, item.failed, item.limit, item.version]
            for item in self.rounds.values()
        ]
        counts, self.counts = self.counts, {}
        answers, self.answers = self.answers, {}
        return Usage(rows, counts, answers)

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
        )

    def _screen(
        self, devices: list[bytes], ids: bytes, offers: Offers, now_s: float
    ) -> tuple[Ints, Ints]:
        """Places of the devices that may get a new lease, and of those that may hold one.

        Marks the devices that are refused.
        """
        count = len(devices)
        allowed = np.ones(count, dtype=np.bool_)
        if self.config.shards > 1:
            words = np.frombuffer(ids, dtype="<u8")[::2]
            wrong = words % np.uint64(self.config.shards) != self.config.shard
            offers.slots[wrong] = WRONG_GATEWAY
            allowed &= ~wrong
        if self.config.min_interval_s:
            limited = self._rate_limited(devices, now_s)
            offers.slots[limited & allowed] = RATE_LIMITED
            allowed &= ~limited
        again = np.fromiter(map(self.leases.by_device.__contains__, devices), np.bool_, count)
        if len(set(devices)) != count:
            first: dict[bytes, int] = {}
            for place, device in enumerate(devices):
                if first.setdefault(device, place) != place:
                    again[place] = True
        return np.flatnonzero(allowed & ~again), np.flatnonzero(allowed & again)

    def _rate_limited(self, devices: list[bytes], now_s: float) -> Bools:
        """Exact last times in two generations, so that memory stays bounded by two intervals."""
        interval_s = self.config.min_interval_s
        if now_s - self._rotated_s > interval_s:
            self._older_seen, self._last_seen = self._last_seen, {}
            self._rotated_s = now_s
        limited = np.zeros(len(devices), dtype=np.bool_)
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

    def _choose(self, masks: list[int], atom_of: Ints, capability: Ints, now_s: float) -> Ints:
        """Round of every device, -1 for none."""
        if now_s >= self._next_end_s:
            self._count_credits(now_s)
        if not any(self._credits.values()):
            return np.full(len(atom_of), -1, dtype=np.int64)
        keys = atom_of * _KINDS
        if self.plan is not None and self.plan.tiered:
            keys = keys + capability

        def ranking(key: int) -> deque[int]:
            atom, kind = divmod(key, _KINDS)
            return self._ranking(masks[atom], kind)

        return assign(keys, ranking, self._credits)

    def _count_credits(self, now_s: float) -> None:
        """Credits of the rounds that have not ended; good until the next one ends."""
        running = [item for item in self.rounds.values() if item.ends_s > now_s]
        self._credits = {item.round_id: item.limit - item.spent for item in running}
        self._next_end_s = min((item.ends_s for item in running), default=np.inf)

    def _ranking(self, mask: int, capability: int) -> deque[int]:
        """Order of the rounds; those at its head without credit are gone until the next plan."""
        assert self.plan is not None
        found = self._rankings.get((mask, capability))
        if found is None:
            found = deque(self.plan.ranking(mask, capability))
            self._rankings[mask, capability] = found
        while found and not self._credits.get(found[0]):
            found.popleft()
        return found

    def _lease(
        self,
        devices: list[bytes],
        places: Ints,
        chosen: Ints,
        capability: Ints,
        offers: Offers,
        now_s: float,
    ) -> None:
        if not len(places):
            return
        found, inverse, counts = np.unique(chosen, return_inverse=True, return_counts=True)
        entries = [self.rounds[item] for item in found.tolist()]
        for entry, count in zip(entries, counts.tolist()):
            entry.spent += count
        counters = self.leases.issue(
            [devices[place] for place in places.tolist()],
            chosen,
            now_s,
            np.asarray([entry.lease_s for entry in entries])[inverse],
            np.asarray([entry.ends_s for entry in entries])[inverse],
            capability[places],
        )
        rows = self.leases.rows(counters, -np.inf)
        self._offer(places, rows, counters, entries, inverse, offers, now_s)

    def _repeat(self, devices: list[bytes], places: Ints, offers: Offers, now_s: float) -> None:
        """A device that holds a lease already gets the same one again."""
        if not len(places):
            return
        rows = self.leases.rows_of([devices[place] for place in places.tolist()], now_s)
        known = rows >= 0
        known[known] = np.isin(self.leases.round_id[rows[known]], list(self.rounds))
        places, rows = places[known], rows[known]
        if not len(places):
            return
        found, inverse = np.unique(self.leases.round_id[rows], return_inverse=True)
        entries = [self.rounds[item] for item in found.tolist()]
        counters = self.leases.counters(rows)
        self._offer(places, rows, counters, entries, inverse, offers, now_s)

    def _offer(
        self,
        places: Ints,
        rows: Ints,
        counters: Counters,
        entries: list[GatewayRound],
        which: Ints,
        offers: Offers,
        now_s: float,
    ) -> None:
        offers.slots[places] = np.asarray([entry.slot for entry in entries], np.int32)[which]
        offers.leases[places] = counters
        offers.expiry_s[places] = self.leases.expires_s[rows] - now_s
        offers.retry_s[places] = 0.0
        for entry in entries:
            offers.rounds[entry.round_id] = entry

    def _settle(self, round_ids: Ints, done: bool) -> None:
        found, counts = np.unique(round_ids, return_counts=True)
        for round_id, count in zip(found.tolist(), counts.tolist()):
            entry = self.rounds.get(round_id)
            if entry is not None and done:
                entry.done += count
            elif entry is not None:
                entry.failed += count

    def _profile(self, rows: Ints, now_s: float) -> None:
        """Note class and response time of devices that finished, for learning tiers."""
        table = self.leases
        for round_id, kind, issued_s in zip(
            table.round_id[rows].tolist(),
            table.capability[rows].tolist(),
            table.issued_s[rows].tolist(),
        ):
            kept = self.answers.setdefault(round_id, [])
            if kind != UNKNOWN and len(kept) < _KEPT_ANSWERS:
                kept.append((kind, now_s - issued_s))


def _floats(name: str, column: bytes) -> npt.NDArray[np.float32]:
    if len(column) % 4:
        raise ConfigError(name, len(column), "a multiple of 4 bytes (float32)")
    return np.frombuffer(column, dtype="<f4")


def _capability(compute: bytes, bandwidth: bytes, count: int) -> Ints:
    """Capability class of every device, UNKNOWN where a batch does not tell."""
    if not compute and not bandwidth:
        return np.full(count, UNKNOWN, dtype=np.int64)
    columns = {"compute": _floats("compute", compute), "bandwidth": _floats("bandwidth", bandwidth)}
    for name, column in columns.items():
        if len(column) != count:
            raise ConfigError(name, len(column), f"{count} values, or none in both columns")
        if not (np.isfinite(column) & (column > 0)).all():
            raise ConfigError(name, "a value out of range", "finite values > 0")
    return capability_classes(columns["compute"], columns["bandwidth"])
