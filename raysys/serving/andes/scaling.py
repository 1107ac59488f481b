"""How many replicas the readers need: decided by their QoE, not by queue lengths.

Ours (the paper's scheduler works inside one engine). Scale up for the demand that is predicted for
when a new replica would be ready, and at once when too many readers are served badly; scale down
one replica at a time, when those that stay would have slack. Pure: the caller's clock and state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysys.config import check, check_range

POINTS = 120  # of the demand's history


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """When to scale.

    Args:
        target_utilisation: readers' demand over the fleet's speed that is aimed at.
        low_utilisation: a replica is given up only if the others would stay below this.
        late_share: share of readers with QoE below 0.95 above which one more replica is wanted.
        cold_start_s: how long a new replica takes until it serves; demand is predicted so far.
        trend_s: memory of the demand's trend.
    """

    target_utilisation: float = 0.8
    low_utilisation: float = 0.5
    late_share: float = 0.10
    cold_start_s: float = 60.0
    trend_s: float = 60.0

    def __post_init__(self) -> None:
        check_range(self, "target_utilisation", 0.0, 1.0, low_open=True)
        check_range(self, "low_utilisation", 0.0, 1.0)
        below = self.low_utilisation < self.target_utilisation
        check(self, "low_utilisation", below, "less than target_utilisation")
        check_range(self, "late_share", 0.0, 1.0)
        check_range(self, "cold_start_s", 0.0)
        check_range(self, "trend_s", 0.0, low_open=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaReading:
    """One replica's figures.

    Args:
        demand_tds: tokens/s that its readers consume together.
        speed_tds: tokens/s of a full batch.
        readers: live requests.
        below_target: readers whose QoE would be below 0.95 if it were scored now.
    """

    demand_tds: float
    speed_tds: float
    readers: float
    below_target: float


def desired_replicas(
    config: ScalingConfig,
    readings: Sequence[ReplicaReading],
    current: int,
    now_s: float,
    state: Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Decide; bounds and delays are the caller's.

    Args:
        readings: of the replicas that reported; those without a speed are left out.
        current: replicas that are wanted now.
        now_s: any clock.
        state: what the last call returned.

    Returns:
        The number of replicas, at least 1, and the state for the next call (JSON-ready).
    """
    usable = [reading for reading in readings if reading.speed_tds > 0.0]
    if not usable or current < 1:
        return max(1, current), dict(state or {})
    demand = sum(reading.demand_tds for reading in usable)
    history = _remember(state, now_s, demand, config.trend_s)
    speed = sum(reading.speed_tds for reading in usable) / len(usable)
    # A trend is not continued for longer than it has been seen: after a start the first reader
    # would otherwise look like a flood.
    seen_s = min(config.cold_start_s, history[-1][0] - history[0][0])
    ahead = max(demand, demand + seen_s * _slope(history))
    needed = max(1, math.ceil(ahead / (config.target_utilisation * speed) - 1e-9))
    readers = sum(reading.readers for reading in usable)
    late = sum(reading.below_target for reading in usable) / max(1.0, readers)
    if late > config.late_share and len(usable) >= current:
        needed = max(needed, current + 1)
    if needed < current:
        relaxed = ahead <= config.low_utilisation * speed * (current - 1)
        calm = relaxed and late <= 0.5 * config.late_share
        needed = current - 1 if calm else current
    return needed, {"history": history}


def _remember(
    state: Mapping[str, Any] | None, now_s: float, demand: float, trend_s: float
) -> list[tuple[float, float]]:
    """The demand of the last ``trend_s`` seconds, at most ``POINTS`` points however often asked."""
    known = [tuple(point) for point in (state or {}).get("history", [])]
    kept = [point for point in known if now_s - trend_s <= point[0] < now_s]
    # Ray Serve asks ten times a second: a limit on the number alone would shorten the memory.
    if kept and now_s - kept[-1][0] < trend_s / POINTS:
        return kept
    return [*kept, (now_s, demand)]


def _slope(history: Sequence[tuple[float, float]]) -> float:
    """Least-squares trend of the demand in tokens/s per second; 0 below three points."""
    if len(history) < 3:
        return 0.0
    points = np.asarray(history, dtype=np.float64)
    times = points[:, 0] - points[:, 0].mean()
    spread = float(times @ times)
    return float(times @ points[:, 1]) / spread if spread > 0.0 else 0.0
