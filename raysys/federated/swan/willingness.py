"""May this device take work now? Quiet hours, battery, heat and loan in one answer."""

from __future__ import annotations

import dataclasses
import math

from raysys.config import check, check_range
from raysys.errors import ConfigError
from raysys.federated.swan.energy import Battery

DAY_S = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WillingnessConfig:
    """The owner's wishes.

    Args:
        quiet_hours: local hours in which nothing is done, such as ``"22-7"``; empty for none.
            Several ranges are separated by commas.
        only_charging: never away from the charger.
        min_level: least battery level away from the charger.
        max_celsius: warmest battery or case at which work is taken.
    """

    quiet_hours: str = ""
    only_charging: bool = False
    min_level: float = 0.3
    max_celsius: float = 40.0

    def __post_init__(self) -> None:
        parse_hours(self.quiet_hours)
        check_range(self, "min_level", 0, 1)
        check(self, "max_celsius", 0 < self.max_celsius <= 60, "degrees in (0, 60]")


def parse_hours(text: str) -> list[tuple[float, float]]:
    """Ranges of hours, each ``start-end`` with both in [0, 24); a range may pass midnight.

    Raises:
        ConfigError: anything else.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        low, _, high = part.partition("-")
        try:
            start, end = float(low), float(high)
        except ValueError:
            start = end = math.nan
        if not (0 <= start < 24 and 0 <= end <= 24 and start != end):
            raise ConfigError("quiet_hours", text, "hours such as 22-7 or 9-12,14-17.5")
        found.append((start, end % 24))
    return found


def refusal(
    config: WillingnessConfig,
    local_s: float,
    battery: Battery,
    celsius: float = math.nan,
    loan: str = "",
) -> str:
    """Why the device takes no work now, or an empty text.

    Args:
        local_s: local time, seconds since any midnight. loan: refusal of the energy loan.
    """
    if quiet_left_s(config, local_s) > 0:
        return "quiet hours"
    if config.only_charging and not battery.external:
        return "not charging"
    if not battery.external and battery.level < config.min_level:
        return "battery is low"
    if celsius > config.max_celsius:
        return "too warm"
    return "" if battery.external else loan


def quiet_left_s(config: WillingnessConfig, local_s: float) -> float:
    """Seconds until the current quiet hours end; 0 outside of them."""
    hour = local_s % DAY_S / 3600.0
    left = 0.0
    for start, end in parse_hours(config.quiet_hours):
        inside = start <= hour < end if start < end else hour >= start or hour < end
        if inside:
            left = max(left, (end - hour) % 24 * 3600.0)
    return left


def home_of(device: bytes, gateways: int) -> int:
    """Which of several gateways a device keeps to: leases are kept per gateway.

    The same rule by which a sharded gateway tells its own devices.
    """
    return int.from_bytes(device[:8], "little") % gateways


def backoff_s(failures: int, fraction: float, first_s: float = 0.5, most_s: float = 300.0) -> float:
    """Wait after ``failures`` failed tries in a row: doubling, with full jitter.

    Args:
        fraction: a random number in [0, 1); some wait always remains.
    """
    ceiling = min(first_s * 2.0 ** min(failures, 30), most_s)
    return ceiling * (0.25 + 0.75 * fraction)
