"""Profiles shared between devices of the same kind: nobody is trusted alone.

A profile is used by others only once a quorum of contributors has sent one for the same key; then
the median over contributors stands, after those far from it were left out. It expires, and a device
still verifies it on itself.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from raysys.config import check, check_range
from raysys.federated.swan.profile import SCHEMA, check_plain

DAY_S = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharingConfig:
    """Rules of trust.

    Args:
        quorum: different contributors that must agree on which choices exist.
        life_s: age from which a contribution no longer counts.
        outlier: a contributor whose times are, in the median over choices, this factor away from
            the consensus is left out.
        strikes: verified deviations after which a key is measured anew.
        max_keys, max_contributors: bounds of the memory that strangers can take.
    """

    quorum: int = 3
    life_s: float = 30 * DAY_S
    outlier: float = 1.5
    strikes: int = 3
    max_keys: int = 10_000
    max_contributors: int = 64

    def __post_init__(self) -> None:
        check_range(self, "quorum", 1)
        check_range(self, "life_s", 0, low_open=True)
        check_range(self, "outlier", 1, low_open=True)
        check_range(self, "strikes", 1)
        check_range(self, "max_keys", 1)
        check(self, "max_contributors", self.max_contributors >= self.quorum, "at least quorum")


@dataclasses.dataclass(slots=True)
class _Entry:
    rows: dict[str, tuple[float, dict[tuple[int, ...], float]]] = dataclasses.field(
        default_factory=dict
    )
    strikes: set[str] = dataclasses.field(default_factory=set)


class ProfileBook:
    """Contributions by key; a key names processor, software, model and batch shape."""

    def __init__(self, config: SharingConfig | None = None) -> None:
        self.config = config or SharingConfig()
        self._entries: dict[str, _Entry] = {}

    def add(self, now_s: float, key: str, contributor: str, plain: Mapping[str, Any]) -> None:
        """Take a contribution; a contributor's newer one replaces its older one.

        Raises:
            ConfigError: a malformed profile, or a key of unreasonable length.
        """
        times = check_plain(plain)
        entry = self._entries.setdefault(key[:256], _Entry())
        entry.rows.pop(contributor, None)
        entry.rows[contributor] = (now_s, times)
        while len(entry.rows) > self.config.max_contributors:
            entry.rows.pop(next(iter(entry.rows)))
        while len(self._entries) > self.config.max_keys:
            self._entries.pop(next(iter(self._entries)))

    def strike(self, key: str, contributor: str) -> None:
        """A device verified the consensus and found it wrong; enough strikes drop the key."""
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.strikes.add(contributor)
        if len(entry.strikes) >= self.config.strikes:
            del self._entries[key]

    def consensus(self, now_s: float, key: str, device: str) -> dict[str, Any] | None:
        """A profile for ``key`` as plain values, or None without a quorum of agreeing devices."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        fresh = [
            times for sent_s, times in entry.rows.values() if now_s - sent_s < self.config.life_s
        ]
        agreeing = self._agreeing(fresh)
        if len(agreeing) < self.config.quorum:
            return None
        rows = []
        for counts in sorted({counts for times in agreeing for counts in times}):
            found = [times[counts] for times in agreeing if counts in times]
            if len(found) >= self.config.quorum:
                rows.append({"counts": list(counts), "seconds": statistics.median(found)})
        return {"schema": SCHEMA, "device": device, "choices": rows} if rows else None

    def _agreeing(
        self, contributions: list[dict[tuple[int, ...], float]]
    ) -> list[dict[tuple[int, ...], float]]:
        medians = {
            counts: statistics.median(t[counts] for t in contributions if counts in t)
            for counts in {counts for times in contributions for counts in times}
        }
        bound = math.log(self.config.outlier)

        def far(times: dict[tuple[int, ...], float]) -> bool:
            off = [abs(math.log(value / medians[counts])) for counts, value in times.items()]
            return statistics.median(off) > bound

        return [times for times in contributions if not far(times)]
