"""Energy, battery and temperature of this machine, each with the name of its source.

Preference: RAPL, fuel gauge, hwmon, and last a model that is labelled as one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from actors.swan.sysfs import folders, number, text
from raysys.federated.swan.energy import Battery, counter_joules, gauge_watts
from raysys.federated.swan.heat import plausible_celsius
from raysys.federated.swan.topology import Topology

SKIN_WORDS = ("skin", "batt", "quiet", "shell", "case")
MODEL_W = {"little": 0.27, "big": 0.69, "prime": 1.08}
MODEL_BASE_W = 0.7
LEAST_SLEEP_S = 0.5


class Meter(Protocol):
    """Joules since the last reading, NaN when they cannot be told."""

    source: str

    def read(self, cores: tuple[int, ...]) -> float:
        """Joules since the last call; ``cores`` are those in use, for the model."""
        ...


class RaplMeter:
    """Energy counters of the processor packages, which cover everybody, not only us."""

    source = "RAPL (package)"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = [(zone, int(number(zone / "max_energy_range_uj") or 0)) for zone in zones]
        self._last = [self._value(zone) for zone, _ in self._zones]
        self.stuck = 0

    def read(self, cores: tuple[int, ...]) -> float:
        """Sum over packages; NaN after an impossible step or from a counter that stands still."""
        total = 0.0
        for place, (zone, span) in enumerate(self._zones):
            before, after = self._last[place], self._value(zone)
            self._last[place] = after
            total += counter_joules(before, after, span)
        self.stuck = self.stuck + 1 if total == 0 else 0
        return math.nan if total == 0 and self.stuck > 2 else total

    @staticmethod
    def _value(zone: Path) -> int:
        found = number(zone / "energy_uj")
        return -1 if found is None else int(found)


class PowerMeter:
    """Power sensors (fuel gauge or hwmon), integrated between readings."""

    def __init__(self, source: str, watts: Callable[[], float], clock: Callable[[], float]) -> None:
        self.source = source
        self._watts, self._clock = watts, clock
        self._at_s = clock()

    def read(self, cores: tuple[int, ...]) -> float:
        """Power now, times the time since the last reading."""
        now_s = self._clock()
        passed_s, self._at_s = now_s - self._at_s, now_s
        return self._watts() * passed_s


class ModelMeter:
    """Constants of a phone's cores: good for comparing choices, not a measurement."""

    source = "power model, not measured"

    def __init__(self, topology: Topology, clock: Callable[[], float]) -> None:
        self._core_w = {c: MODEL_W[g.kind] for g in topology.clusters for c in g.cores}
        self._clock = clock
        self._at_s = clock()

    def read(self, cores: tuple[int, ...]) -> float:
        """Power of the cores in use, times the time since the last reading."""
        now_s = self._clock()
        passed_s, self._at_s = now_s - self._at_s, now_s
        return (MODEL_BASE_W + sum(self._core_w.get(core, 0.69) for core in cores)) * passed_s


class SleepWatch:
    """Seconds that the machine was suspended: one clock goes on in sleep, another stops.

    Args:
        clocks: both in seconds, for tests.
    """

    def __init__(
        self,
        clocks: Callable[[], tuple[float, float]] = lambda: (
            time.clock_gettime(time.CLOCK_BOOTTIME),
            time.clock_gettime(time.CLOCK_MONOTONIC),
        ),
    ) -> None:
        self._clocks = clocks
        self._ahead_s = self._ahead()

    def read(self) -> float:
        """Seconds of sleep since the last reading; 0 below what reading two clocks may differ."""
        before, self._ahead_s = self._ahead_s, self._ahead()
        slept_s = self._ahead_s - before
        return slept_s if slept_s > LEAST_SLEEP_S else 0.0

    def _ahead(self) -> float:
        boot, monotonic = self._clocks()
        return boot - monotonic


def choose_meter(topology: Topology, clock: Callable[[], float], sys_root: Path) -> Meter:
    """The best source of energy that works on this machine."""
    zones = [
        zone
        for zone in folders(sys_root / "class/powercap", "intel-rapl:*")
        if zone.name.count(":") == 1 and number(zone / "energy_uj") is not None
    ]
    if zones:
        return RaplMeter(zones)
    for supply in folders(sys_root / "class/power_supply", "*"):
        if text(supply / "type") == "Battery" and math.isfinite(_gauge(supply)):
            return PowerMeter("fuel gauge", partial(_gauge, supply), clock)
    for sensor in folders(sys_root / "class/hwmon", "hwmon*/power1_*"):
        if sensor.name in ("power1_input", "power1_average") and (number(sensor) or 0) > 0:
            return PowerMeter("hwmon", partial(_hwmon, sensor), clock)
    return ModelMeter(topology, clock)


def read_battery(sys_root: Path) -> tuple[Battery, float]:
    """Supply state and usable energy in Wh; without a battery, external power and 0 Wh.

    An unknown charging status counts as not charging: the careful side.
    """
    mains = False
    for supply in folders(sys_root / "class/power_supply", "*"):
        if text(supply / "type") in ("Mains", "USB", "Wireless"):
            mains = mains or number(supply / "online") == 1
    for supply in folders(sys_root / "class/power_supply", "*"):
        if text(supply / "type") != "Battery":
            continue
        level = number(supply / "capacity")
        status = text(supply / "status") or "Unknown"
        external = mains or status in ("Charging", "Full")
        shown = 0.0 if level is None else min(max(level / 100.0, 0.0), 1.0)
        return Battery(level=shown, external=external), _battery_wh(supply)
    return Battery(), 0.0


def read_celsius(sys_root: Path) -> float:
    """Skin or battery temperature; NaN where no such sensor is believable.

    Processor sensors are left out: 70 degrees are normal there and say nothing about the case.
    """
    raw: list[float] = []
    for zone in folders(sys_root / "class/thermal", "thermal_zone*"):
        kind = (text(zone / "type") or "").lower()
        disabled = text(zone / "mode") == "disabled"
        value = number(zone / "temp")
        if any(word in kind for word in SKIN_WORDS) and not disabled and value is not None:
            raw.append(value)
    for supply in folders(sys_root / "class/power_supply", "*"):
        tenths = number(supply / "temp")
        if tenths is not None:
            raw.append(tenths / 10.0)
    return plausible_celsius(raw)


def _gauge(supply: Path) -> float:
    current, voltage = number(supply / "current_now"), number(supply / "voltage_now")
    if current is None or voltage is None:
        return math.nan
    return gauge_watts(current, voltage)


def _hwmon(sensor: Path) -> float:
    return (number(sensor) or math.nan) * 1e-6


def _battery_wh(supply: Path) -> float:
    energy = number(supply / "energy_full")
    if energy:
        return energy * 1e-6
    charge = number(supply / "charge_full") or number(supply / "charge_full_design")
    return charge * 1e-6 * 3.85 if charge else 15.0
