"""Credits: how gateways may assign devices without asking a central counter each time.

Each (gateway, round) has a *limit*: the number of devices the gateway may give to the round in all.
The scheduler may raise a limit at once, but after lowering it must assume the old one until the
gateway confirms; the largest limit that may still be in force is the *ceiling*. The sum of ceilings
never exceeds what the round may get, so the total assigned never does either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysys.errors import ConfigError


@dataclass(slots=True)
class Grant:
    """One gateway's part of one round; all counters are cumulative."""

    limit: int = 0
    ceiling: int = 0
    version: int = 0
    spent: int = 0
    done: int = 0
    failed: int = 0
    marked: int = 0
    idle: bool = False

    def mark(self) -> None:
        """Note whether credit was left and none spent since the last mark; without credit, nothing
        can be told and the old finding stays."""
        if self.limit > self.spent:
            self.idle = self.spent == self.marked
        self.marked = self.spent

    def set_limit(self, limit: int) -> None:
        """Send a new limit; the ceiling falls only when the gateway confirms."""
        limit = max(limit, self.spent)
        if limit != self.limit:
            self.limit = limit
            self.version += 1
            self.ceiling = max(self.ceiling, limit)

    def confirm(self, spent: int, done: int, failed: int, limit: int, version: int) -> None:
        """Book a gateway's report.

        Raises:
            ConfigError: a counter ran backwards, or exceeds what was granted.
        """
        if spent < self.spent or done < self.done or failed < self.failed:
            raise ConfigError("usage", (spent, done, failed), "counters that never fall")
        if spent > self.ceiling:
            raise ConfigError("usage.spent", spent, f"at most the granted {self.ceiling}")
        if done + failed > spent:
            raise ConfigError("usage.done", done + failed, f"at most the spent {spent}")
        self.spent, self.done, self.failed = spent, done, failed
        if version == self.version:
            self.limit = min(max(limit, spent), self.ceiling)
            self.ceiling = self.limit


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split ``total`` into whole parts by weight (largest remainder); the parts sum to it.

    Raises:
        ConfigError: negative total, negative weight, or no weights for a positive total.
    """
    if total < 0:
        raise ConfigError("total", total, "a number >= 0")
    if any(weight < 0 for weight in weights):
        raise ConfigError("weights", list(weights), "numbers >= 0")
    if not weights:
        if total:
            raise ConfigError("weights", [], "at least one weight")
        return []
    mass = sum(weights)
    shares = [total * weight / mass if mass else total / len(weights) for weight in weights]
    parts = [int(share) for share in shares]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - shares[i], i))
    for place in range(total - sum(parts)):
        parts[order[place % len(order)]] += 1
    return parts
