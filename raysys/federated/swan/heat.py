"""Temperatures: which readings to believe, and what they forbid."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable

from raysys.config import check, check_range


class Heat(enum.IntEnum):
    """What the temperature allows."""

    COOL = 0
    WARM = 1  # no upgrades
    HOT = 2  # downgrade every few seconds
    CRITICAL = 3  # pause


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeatConfig:
    """Thresholds in degrees Celsius of skin or battery.

    Args:
        margin: a state ends only so far below its threshold.
    """

    warm: float = 40.0
    hot: float = 43.0
    critical: float = 45.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        check(self, "hot", self.warm < self.hot < self.critical, "between warm and critical")
        check_range(self, "margin", 0)


class HeatWatch:
    """Turns readings into a state with hysteresis; no reading at all counts as cool."""

    def __init__(self, config: HeatConfig | None = None) -> None:
        self.config = config or HeatConfig()
        self.state = Heat.COOL
        self.celsius = math.nan
        self.rising = False

    def read(self, celsius: float) -> Heat:
        """Take a reading; NaN (the zone vanished) keeps the last state."""
        if math.isnan(celsius):
            return self.state
        self.rising = not celsius < self.celsius
        self.celsius = celsius
        config = self.config
        bounds = (
            (Heat.CRITICAL, config.critical),
            (Heat.HOT, config.hot),
            (Heat.WARM, config.warm),
        )
        for level, bound in bounds:
            lowered = bound - config.margin if self.state >= level else bound
            if celsius >= lowered:
                self.state = level
                return level
        self.state = Heat.COOL
        return self.state


def plausible_celsius(raw: Iterable[float]) -> float:
    """Hottest believable reading in Celsius of sysfs values; NaN without any.

    Values above 1,000 are milli-degrees. 0, below zero and above 120 degrees are what broken or
    disabled zones report and are left out.
    """
    readings = [value / 1000.0 if abs(value) > 1000 else value for value in raw]
    good = [value for value in readings if math.isfinite(value) and 0 < value <= 120]
    return max(good, default=math.nan)
