"""How many devices of each kind check in: rates per atom, and what the planner reads of them.

An *atom* is the set of devices with one eligibility mask. Rates are averaged over the last 24 hours
so that the daily rhythm does not make the plan flap (paper, section 4.2). Three estimators: a
window of one-minute counters (default), exponential decay with the same mean age, and the last N
check-ins that the public program uses. Until enough check-ins were seen a Dirichlet prior over the
known atoms stands in (our choice; the paper is silent).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from raysys.config import check_choice, check_range
from raysys.errors import ConfigError

TINY_RATE = 1e-9
MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class SupplyView:
    """Supply as the planner sees it; atoms and groups are dense indices.

    Args:
        masks: eligibility mask of every atom; bit g means group g.
        rates: devices per second of every atom.
        group_rates: devices per second eligible for every group, ``|S_j|`` of the paper.
        group_atoms: bitset of the atoms eligible for every group.
    """

    masks: tuple[int, ...]
    rates: tuple[float, ...]
    group_rates: tuple[float, ...]
    group_atoms: tuple[int, ...]

    @classmethod
    def build(cls, masks: Sequence[int], rates: Sequence[float], groups: int) -> SupplyView:
        """Collect the group sums of ``masks`` and ``rates`` (devices per second)."""
        group_rates, group_atoms = [0.0] * groups, [0] * groups
        for atom, (mask, rate) in enumerate(zip(masks, rates)):
            rest = mask
            while rest:
                low = rest & -rest
                group = low.bit_length() - 1
                group_rates[group] += rate
                group_atoms[group] |= 1 << atom
                rest ^= low
        floored = tuple(max(rate, TINY_RATE) for rate in group_rates)
        return cls(tuple(masks), tuple(rates), floored, tuple(group_atoms))


@dataclass(frozen=True, kw_only=True, slots=True)
class SupplyConfig:
    """Estimator of the check-in rates.

    Args:
        estimator: ``window`` (counters), ``decay`` (exponential) or ``last_n`` (public program).
        window_s: length of the window, or mean age under ``decay``.
        last_n: check-ins that ``last_n`` remembers.
        min_samples: below this many check-ins the prior is mixed in.
        prior_weight: weight of the prior, in check-ins.
    """

    estimator: Literal["window", "decay", "last_n"] = "window"
    window_s: float = 86_400.0
    last_n: int = 1000
    min_samples: int = 200
    prior_weight: float = 50.0

    def __post_init__(self) -> None:
        check_choice(self, "estimator", ("window", "decay", "last_n"))
        check_range(self, "window_s", MINUTE_S)
        check_range(self, "last_n", 1)
        check_range(self, "min_samples", 0)
        check_range(self, "prior_weight", 0)


@dataclass(slots=True)
class SupplyEstimator:
    """Rates per eligibility mask from counted check-ins; time is passed in, in seconds."""

    config: SupplyConfig = field(default_factory=SupplyConfig)
    start_s: float | None = None
    seen: int = 0
    minutes: deque[tuple[int, dict[int, int]]] = field(default_factory=deque)
    window: dict[int, int] = field(default_factory=dict)
    decayed: dict[int, float] = field(default_factory=dict)
    decayed_at_s: float = 0.0
    recent: deque[tuple[float, int, int]] = field(default_factory=deque)
    recent_total: int = 0

    def observe(self, counts: Mapping[int, int], now_s: float) -> None:
        """Count check-ins by mask at ``now_s``; time may not run backwards by more than a minute.

        Raises:
            ConfigError: a count is negative.
        """
        if any(count < 0 for count in counts.values()):
            raise ConfigError("counts", dict(counts), "numbers >= 0")
        if self.start_s is None:
            self.start_s = self.decayed_at_s = now_s
        self.seen += sum(counts.values())
        self._decay_to(now_s)
        self._count_minute(counts, now_s)
        for mask, count in counts.items():
            self.decayed[mask] = self.decayed.get(mask, 0.0) + count
            self.recent.append((now_s, mask, count))
            self.recent_total += count
        while self.recent and self.recent_total - self.recent[0][2] >= self.config.last_n:
            self.recent_total -= self.recent.popleft()[2]

    def rates(self, masks: Sequence[int], now_s: float) -> list[float]:
        """Devices per second of every mask, the prior mixed in while the sample is small."""
        counts, span_s = self._counts(now_s)
        if self.seen >= self.config.min_samples or not masks:
            return [counts.get(mask, 0.0) / span_s for mask in masks]
        share = self.config.prior_weight / len(masks)
        total = sum(counts.get(mask, 0.0) for mask in masks)
        scale = max(total, 1.0) / (total + self.config.prior_weight) / span_s
        return [(counts.get(mask, 0.0) + share) * scale for mask in masks]

    def _counts(self, now_s: float) -> tuple[Mapping[int, float], float]:
        start_s = now_s if self.start_s is None else self.start_s
        age_s = max(now_s - start_s, 1.0)
        if self.config.estimator == "decay":
            self._decay_to(now_s)
            span_s = self.config.window_s * -np.expm1(-age_s / self.config.window_s)
            return self.decayed, max(float(span_s), 1.0)
        if self.config.estimator == "last_n":
            recent: dict[int, float] = {}
            for _, mask, count in self.recent:
                recent[mask] = recent.get(mask, 0.0) + count
            first_s = self.recent[0][0] if self.recent else now_s
            return recent, max(now_s - first_s, 1.0)
        self._expire(now_s)
        return self.window, min(age_s, self.config.window_s)

    def _decay_to(self, now_s: float) -> None:
        passed_s = max(now_s - self.decayed_at_s, 0.0)
        if passed_s:
            factor = float(np.exp(-passed_s / self.config.window_s))
            self.decayed = {mask: count * factor for mask, count in self.decayed.items()}
            self.decayed_at_s = now_s

    def _count_minute(self, counts: Mapping[int, int], now_s: float) -> None:
        minute = int(now_s // MINUTE_S)
        if not self.minutes or self.minutes[-1][0] < minute:
            self.minutes.append((minute, {}))
        latest = self.minutes[-1][1]
        for mask, count in counts.items():
            latest[mask] = latest.get(mask, 0) + count
            self.window[mask] = self.window.get(mask, 0) + count
        self._expire(now_s)

    def _expire(self, now_s: float) -> None:
        oldest = int((now_s - self.config.window_s) // MINUTE_S)
        while self.minutes and self.minutes[0][0] < oldest:
            for mask, count in self.minutes.popleft()[1].items():
                left = self.window[mask] - count
                if left:
                    self.window[mask] = left
                else:
                    del self.window[mask]
