"""The energy loan, and how counters of energy are read without believing their faults.

Training borrows energy that the owner would otherwise have; charging repays it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from raysys.config import check_range

DAY_S = 86_400.0
PLAUSIBLE_W = (0.1, 15.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoanConfig:
    """Limits of borrowing.

    Args:
        share: part of the battery's energy that may be owed, at most ``max_wh``.
        floor: battery level below which nothing trains away from the charger.
        end_level: level that must be projected for the end of the day.
        repay_above: battery level from which the charger's surplus repays the loan.
    """

    share: float = 0.1
    max_wh: float = 1.5
    floor: float = 0.3
    end_level: float = 0.2
    repay_above: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, "max_wh", 0)
        for name in ("share", "floor", "end_level", "repay_above"):
            check_range(self, name, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Battery:
    """Supply state; a host without a battery is external at level 1.

    Args:
        level: share of the charge that is left. external: on external power.
        drain_w: the owner's own recent use, for the projection.
    """

    level: float = 1.0
    external: bool = True
    drain_w: float = 0.0


class EnergyLoan:
    """What training owes the owner.

    Args:
        battery_wh: usable energy of the battery; 0 for a device without one, which never owes.
    """

    def __init__(self, battery_wh: float, config: LoanConfig | None = None) -> None:
        self.config = config or LoanConfig()
        self.battery_wh = max(battery_wh, 0.0)
        self.loan_j = 0.0
        self.borrowed_j = 0.0
        self.by_day: dict[int, float] = {}

    @property
    def allowance_j(self) -> float:
        """Most that may be owed."""
        return 3600.0 * min(self.config.share * self.battery_wh, self.config.max_wh)

    @property
    def used(self) -> float:
        """Loan over allowance, in [0, 1]."""
        if self.allowance_j <= 0:
            return 0.0 if self.battery_wh == 0 else 1.0
        return min(max(self.loan_j / self.allowance_j, 0.0), 1.0)

    def spend(self, now_s: float, joules: float, battery: Battery) -> None:
        """Account for a step; on external power, or without a known energy, nothing is owed."""
        if battery.external or not math.isfinite(joules) or joules < 0:
            return
        self.loan_j += joules
        self.borrowed_j += joules
        day = int(now_s // DAY_S)
        self.by_day = {day: self.by_day.get(day, 0.0) + joules, **_others(self.by_day, day)}

    def repay(self, joules: float, battery: Battery) -> None:
        """Charger surplus, which counts once the battery has passed ``repay_above``."""
        if battery.external and battery.level >= self.config.repay_above and joules > 0:
            self.loan_j = max(self.loan_j - joules, 0.0)

    def refusal(self, now_s: float, battery: Battery) -> str:
        """Why training must wait, or an empty text."""
        if battery.external or self.battery_wh == 0:
            return ""
        if self.loan_j >= self.allowance_j:
            return "energy loan is used up"
        if battery.level <= self.config.floor:
            return "battery is below its floor"
        left_s = DAY_S - now_s % DAY_S
        projected = battery.level - battery.drain_w * left_s / (3600.0 * self.battery_wh)
        if projected <= self.config.end_level:
            return "battery would not last the day"
        return ""

    def joule_price_s(self, slowest_s: float, dearest_j: float, battery: Battery) -> float:
        """``mu``: seconds that a joule is worth; rises to ``L_max / E_max`` with the loan."""
        if battery.external or not dearest_j > 0:
            return 0.0
        return self.used * slowest_s / dearest_j

    def state(self) -> dict[str, float]:
        """What must survive a restart."""
        return {"loan_j": self.loan_j, "borrowed_j": self.borrowed_j}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore :meth:`state`."""
        self.loan_j = max(float(state["loan_j"]), 0.0)
        self.borrowed_j = max(float(state["borrowed_j"]), 0.0)


def counter_joules(before_uj: int, after_uj: int, range_uj: int) -> float:
    """Joules between two readings of a RAPL counter that wraps at ``range_uj``.

    Returns:
        NaN where the readings cannot be true (outside the range, or no range and a step back).
    """
    if min(before_uj, after_uj) < 0 or (range_uj > 0 and max(before_uj, after_uj) > range_uj):
        return math.nan
    moved = after_uj - before_uj
    if moved < 0:
        moved += range_uj
        if range_uj <= 0:
            return math.nan
    return moved * 1e-6


def gauge_watts(current: float, voltage: float) -> float:
    """Battery power from a fuel gauge whose units and sign differ by vendor; NaN if implausible.

    Currents come in uA or mA and with either sign, voltages in uV or mV. Each combination is tried
    and the one between 0.1 and 15 W is taken.
    """
    volts = next((voltage * s for s in (1e-6, 1e-3, 1.0) if 2.0 <= voltage * s <= 25.0), math.nan)
    for scale in (1e-6, 1e-3):
        watts = abs(current) * scale * volts
        if PLAUSIBLE_W[0] <= watts <= PLAUSIBLE_W[1]:
            return watts
    return math.nan


def _others(by_day: Mapping[int, float], day: int) -> dict[int, float]:
    return {key: value for key, value in by_day.items() if key != day and key > day - 31}
