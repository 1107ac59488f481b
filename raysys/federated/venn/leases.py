"""Leases: which device works for which round, and until when. Columns, so that batches stay cheap.

A lease's counter is ``generation * 2^32 + row``: rows are used again, counters never repeat. Equal
expiry times of one batch share an entry of the expiry heap (the specification's timing wheel would
look at every lease of the current second again and again).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Counters = npt.NDArray[np.uint64]

_FIRST_ROWS = 1024
_ROW_BITS = np.uint64(32)
_ROW_MASK = np.uint64(2**32 - 1)


@dataclass(slots=True)
class LeaseTable:
    """All leases of one gateway incarnation. Times are seconds of the server's monotonic clock.

    The columns have one entry per row: ``round_id``, ``expires_s``, ``ends_s`` (of the round),
    ``issued_s``, ``capability`` (class of the device) and ``live``.
    """

    by_device: dict[bytes, int] = field(default_factory=dict)
    round_id: Ints = field(default_factory=lambda: np.zeros(_FIRST_ROWS, np.int64))
    expires_s: Floats = field(default_factory=lambda: np.zeros(_FIRST_ROWS))
    ends_s: Floats = field(default_factory=lambda: np.zeros(_FIRST_ROWS))
    issued_s: Floats = field(default_factory=lambda: np.zeros(_FIRST_ROWS))
    capability: Ints = field(default_factory=lambda: np.zeros(_FIRST_ROWS, np.int64))
    live: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(_FIRST_ROWS, np.bool_))
    _device: npt.NDArray[np.object_] = field(default_factory=lambda: np.empty(_FIRST_ROWS, object))
    _generation: Counters = field(default_factory=lambda: np.zeros(_FIRST_ROWS, np.uint64))
    _free: Ints = field(default_factory=lambda: np.arange(_FIRST_ROWS - 1, -1, -1))
    _free_count: int = _FIRST_ROWS
    _due: list[tuple[float, int, Counters]] = field(default_factory=list)
    _serial: int = 0

    def __len__(self) -> int:
        return len(self.by_device)

    def issue(
        self,
        devices: Sequence[bytes],
        round_ids: npt.ArrayLike,
        now_s: float,
        lease_s: npt.ArrayLike,
        ends_s: npt.ArrayLike,
        capability: npt.ArrayLike = 0,
    ) -> Counters:
        """Give N distinct devices a lease each, never past the end of the round.

        Args:
            round_ids, lease_s, ends_s, capability: one value, or one for every device.

        Returns:
            The counters of the leases, uint64, length N.

        Raises:
            ConfigError: a device holds a lease already; nothing was issued.
        """
        taken = [device for device in devices if device in self.by_device]
        if taken or len(set(devices)) != len(devices):
            shown = (taken or list(devices))[0].hex()
            raise ConfigError("device", shown, "devices without a live lease, each once")
        rows = self._take(len(devices))
        self.round_id[rows] = round_ids
        self.ends_s[rows] = ends_s
        self.expires_s[rows] = np.minimum(now_s + np.asarray(lease_s), self.ends_s[rows])
        self.issued_s[rows] = now_s
        self.capability[rows] = capability
        self.live[rows] = True
        self._generation[rows] += np.uint64(1)
        self._device[rows] = np.fromiter(devices, object, len(devices))
        self.by_device.update(zip(devices, rows.tolist()))
        self._schedule(rows)
        return self.counters(rows)

    def counters(self, rows: Ints) -> Counters:
        """Counters of the leases in these rows."""
        found: Counters = (self._generation[rows] << _ROW_BITS) | rows.astype(np.uint64)
        return found

    def rows(self, counters: Counters, now_s: float) -> Ints:
        """Rows of leases that are live at ``now_s``; -1 for one that is unknown or has expired."""
        rows = (counters & _ROW_MASK).astype(np.int64)
        known = rows < len(self.live)
        rows[~known] = 0
        known &= self.live[rows] & (self._generation[rows] == counters >> _ROW_BITS)
        known &= self.expires_s[rows] > now_s
        rows[~known] = -1
        return rows

    def rows_of(self, devices: Sequence[bytes], now_s: float) -> Ints:
        """Rows of the live leases of devices; -1 for a device without one."""
        held = (self.by_device.get(device, -1) for device in devices)
        rows = np.fromiter(held, np.int64, len(devices))
        rows[(rows >= 0) & (self.expires_s[rows] <= now_s)] = -1
        return rows

    def devices(self, rows: Ints) -> list[bytes]:
        """Who holds the leases in these rows."""
        held: list[bytes] = self._device[rows].tolist()
        return held

    def prolong(self, rows: Ints, now_s: float, lease_s: npt.ArrayLike) -> Floats:
        """Let live leases last ``lease_s`` from now, never past the round's end, never shorter."""
        wanted = np.minimum(now_s + np.asarray(lease_s), self.ends_s[rows])
        self.expires_s[rows] = np.maximum(self.expires_s[rows], wanted)
        self._schedule(rows)
        return self.expires_s[rows]

    def drop(self, rows: Ints) -> None:
        """End live leases; their rows are free afterwards, the columns still readable until then.

        Rows must be distinct.
        """
        for device in self._device[rows].tolist():
            del self.by_device[device]
        self._device[rows] = None
        self.live[rows] = False
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)

    def expire(self, now_s: float) -> Ints:
        """End the leases that ran out by ``now_s``; the rounds they were for, one entry each."""
        ended = []
        while self._due and self._due[0][0] <= now_s:
            counters = heapq.heappop(self._due)[2]
            rows = (counters & _ROW_MASK).astype(np.int64)
            current = self.live[rows] & (self._generation[rows] == counters >> _ROW_BITS)
            rows = rows[current & (self.expires_s[rows] <= now_s)]
            if len(rows):
                ended.append(self.round_id[rows])
                self.drop(rows)
        return np.concatenate(ended) if ended else np.zeros(0, np.int64)

    def _schedule(self, rows: Ints) -> None:
        times, which = np.unique(self.expires_s[rows], return_inverse=True)
        counters = self.counters(rows)
        for place, time_s in enumerate(times.tolist()):
            self._serial += 1
            members = counters if len(times) == 1 else counters[which == place]
            heapq.heappush(self._due, (time_s, self._serial, members))

    def _take(self, count: int) -> Ints:
        while self._free_count < count:
            self._grow()
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count].copy()

    def _grow(self) -> None:
        size = len(self.live)
        for name in ("round_id", "expires_s", "ends_s", "issued_s", "capability", "live"):
            setattr(self, name, np.resize(getattr(self, name), 2 * size))
        self.live[size:] = False
        self._device = np.concatenate([self._device, np.empty(size, object)])
        self._generation = np.concatenate([self._generation, np.zeros(size, np.uint64)])
        free = np.empty(2 * size, np.int64)
        free[: self._free_count] = self._free[: self._free_count]
        free[self._free_count : self._free_count + size] = np.arange(2 * size - 1, size - 1, -1)
        self._free = free
        self._free_count += size
