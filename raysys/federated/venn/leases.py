"""Leases: which device works for which round, and until when. Timing wheel of one-second slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from raysys.errors import ConfigError


@dataclass(slots=True)
class Lease:
    """A device's assignment. Times are seconds of the server's monotonic clock."""

    counter: int
    device: bytes
    round_id: int
    expires_s: float
    ends_s: float


@dataclass(slots=True)
class LeaseTable:
    """All leases of one gateway incarnation; every operation is O(1) per lease."""

    leases: dict[int, Lease] = field(default_factory=dict)
    by_device: dict[bytes, int] = field(default_factory=dict)
    wheel: dict[int, list[int]] = field(default_factory=dict)
    swept_s: int | None = None
    issued: int = 0

    def issue(
        self, device: bytes, round_id: int, now_s: float, lease_s: float, ends_s: float
    ) -> Lease:
        """Give ``device`` a lease of ``lease_s`` seconds, at most until the round ends.

        Raises:
            ConfigError: the device holds a lease already.
        """
        if device in self.by_device:
            raise ConfigError("device", device.hex(), "a device without a live lease")
        self.issued += 1
        lease = Lease(self.issued, device, round_id, min(now_s + lease_s, ends_s), ends_s)
        self.leases[lease.counter] = lease
        self.by_device[device] = lease.counter
        self._schedule(lease)
        return lease

    def of_device(self, device: bytes, now_s: float) -> Lease | None:
        """The device's live lease, if it has one."""
        counter = self.by_device.get(device)
        if counter is None:
            return None
        lease = self.leases[counter]
        return lease if lease.expires_s > now_s else None

    def renew(self, counter: int, now_s: float, lease_s: float) -> Lease | None:
        """Prolong a live lease from now, never past its round's end; None if it is not live."""
        lease = self.leases.get(counter)
        if lease is None or lease.expires_s <= now_s:
            return None
        lease.expires_s = max(lease.expires_s, min(now_s + lease_s, lease.ends_s))
        self._schedule(lease)
        return lease

    def release(self, counter: int, now_s: float) -> Lease | None:
        """End a live lease; None if it is unknown or has expired."""
        lease = self.leases.get(counter)
        if lease is None or lease.expires_s <= now_s:
            return None
        self._drop(lease)
        return lease

    def expire(self, now_s: float) -> list[Lease]:
        """Remove and return the leases that ran out by ``now_s``."""
        last = int(now_s)
        if self.swept_s is None:
            self.swept_s = min(self.wheel, default=last)
        slots = range(self.swept_s, last + 1)
        if len(slots) > len(self.wheel):
            due: Iterable[int] = sorted(slot for slot in self.wheel if slot <= last)
        else:
            due = slots
        expired = []
        for slot in list(due):
            for counter in self.wheel.pop(slot, ()):
                lease = self.leases.get(counter)
                if lease is None or int(lease.expires_s) > slot:
                    continue
                if lease.expires_s <= now_s:
                    self._drop(lease)
                    expired.append(lease)
                else:
                    self.wheel.setdefault(slot, []).append(counter)
        self.swept_s = last
        return expired

    def _schedule(self, lease: Lease) -> None:
        slot = int(lease.expires_s)
        if self.swept_s is not None:
            slot = max(slot, self.swept_s)
        self.wheel.setdefault(slot, []).append(lease.counter)

    def _drop(self, lease: Lease) -> None:
        del self.leases[lease.counter]
        del self.by_device[lease.device]
