"""Model of a phone's processor: time, power and heat of a training step.

It stands in for phones that we do not have. Core capacities and power coefficients are those of
Linux device trees, clocks those of data sheets; the shares of the workloads and ``beta``, a
scenario of the software stack, are reasoned. None of its numbers is a measurement of a phone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysys.config import check, check_range, config_from_dict
from raysys.errors import DataError, StorageError
from raysys.federated.swan.choices import Choice
from raysys.federated.swan.topology import Cluster, Topology, kinds_of

BASE_W = 0.7  # display-off platform and memory while training
BANDWIDTH = 2.0  # memory saturates at about two fast cores
FORK_JOIN = 0.004
EFFICIENCY_LOSS = 0.05
HEALTHY_EXPONENT = -0.85
CELL_V = 3.85
LOW_V = 0.6
TOP_V = {"little": 0.80, "big": 0.88, "prime": 0.95}
REFERENCE_MS = 44.0  # AI-Benchmark CPU float latency of the device whose prime core is the unit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CoreType:
    """Equal cores of a phone.

    Args:
        count: number of cores. max_mhz, min_mhz: clock range.
        capacity_per_mhz: ``capacity-dmips-mhz`` of the device tree.
        power: ``dynamic-power-coefficient`` in uW/MHz/V^2.
    """

    count: int
    max_mhz: float
    capacity_per_mhz: float = 1024.0
    power: float = 400.0
    min_mhz: float = 300.0

    def __post_init__(self) -> None:
        check_range(self, "count", 1, 64)
        for name in ("max_mhz", "capacity_per_mhz", "power", "min_mhz"):
            check_range(self, name, 0, low_open=True)
        check(self, "min_mhz", self.min_mhz <= self.max_mhz, "at most max_mhz")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phone:
    """A phone, as a small JSON file can describe it.

    Args:
        cores: core types, in any order.
        battery_mah: of a 3.85 V cell. latency_ms: AI-Benchmark CPU float latency, for speed
            between phones. ram_gb: memory.
        resistance_k_per_w, heat_j_per_k: first-order thermal model of the case.
    """

    name: str
    soc: str
    cores: tuple[CoreType, ...]
    battery_mah: float = 4000.0
    latency_ms: float = REFERENCE_MS
    ram_gb: float = 6.0
    resistance_k_per_w: float = 8.0
    heat_j_per_k: float = 60.0

    def __post_init__(self) -> None:
        check(self, "cores", bool(self.cores), "at least one core type")
        for name in ("battery_mah", "latency_ms", "ram_gb", "resistance_k_per_w", "heat_j_per_k"):
            check_range(self, name, 0, low_open=True)

    @property
    def clusters(self) -> tuple[CoreType, ...]:
        """Core types, slowest first."""
        return tuple(sorted(self.cores, key=lambda core: core.capacity_per_mhz * core.max_mhz))

    @property
    def speeds(self) -> tuple[float, ...]:
        """Full-clock speed of each cluster relative to the fastest."""
        raw = [core.capacity_per_mhz * core.max_mhz for core in self.clusters]
        return tuple(value / raw[-1] for value in raw)

    @property
    def battery_wh(self) -> float:
        return self.battery_mah * CELL_V / 1000.0

    @property
    def rate(self) -> float:
        """Speed of the fastest core relative to the reference phone's."""
        return REFERENCE_MS / self.latency_ms

    def topology(self) -> Topology:
        """The phone as the engine would discover it; core ids count from the slowest."""
        clusters, first = [], 0
        for core, speed, kind in zip(self.clusters, self.speeds, kinds_of(self.speeds)):
            ids = tuple(range(first, first + core.count))
            clusters.append(Cluster(cores=ids, speed=speed, kind=kind, max_mhz=core.max_mhz))
            first += core.count
        return Topology(clusters=tuple(clusters), device=self.soc)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A network as shares of one-core time; they sum to one."""

    name: str
    dense: float
    depthwise: float
    memory: float

    def __post_init__(self) -> None:
        for name in ("dense", "depthwise", "memory"):
            check_range(self, name, 0, 1)
        total = self.dense + self.depthwise + self.memory
        check(self, "memory", math.isclose(total, 1.0, abs_tol=1e-6), "shares that sum to 1")


RESNET34 = Workload(name="ResNet-34", dense=0.88, depthwise=0.0, memory=0.12)
MOBILENETV2 = Workload(name="MobileNetV2", dense=0.35, depthwise=0.45, memory=0.20)
SHUFFLENETV2 = Workload(name="ShuffleNetV2", dense=0.20, depthwise=0.60, memory=0.20)
WORKLOADS = (RESNET34, MOBILENETV2, SHUFFLENETV2)
BETAS = (0.0, 1.0, 4.0)


def step_time(
    phone: Phone,
    workload: Workload,
    choice: Choice,
    beta: float,
    *,
    clock: Sequence[float] = (),
    stolen: Sequence[float] = (),
    stolen_bandwidth: float = 0.0,
) -> float:
    """Time of a step, in units of the phone's own one-prime-core step.

    Args:
        beta: 0 for healthy depthwise kernels; above it, each further thread adds that share of
            the one-core depthwise time.
        clock: current over full clock of each cluster; empty means full.
        stolen: share of each core that the owner's work takes, by cluster; empty means none.
        stolen_bandwidth: share of the memory bandwidth that it takes.
    """
    pace = [
        speed * (clock[i] if clock else 1.0) * (1.0 - (stolen[i] if stolen else 0.0))
        for i, speed in enumerate(phone.speeds)
        if choice.counts[i]
    ]
    r, n = max(min(pace), 1e-3), choice.threads
    spread = n**HEALTHY_EXPONENT if beta == 0 else 1.0 + beta * (n - 1)
    bandwidth = max(BANDWIDTH * (1.0 - stolen_bandwidth), 1e-3)
    dense = workload.dense / (r * n * (1.0 - EFFICIENCY_LOSS * (min(n, 16) - 1)))
    depthwise = workload.depthwise * spread / r
    memory = workload.memory / min(r * n, bandwidth)
    return dense + depthwise + memory + FORK_JOIN * math.log2(n)


def core_power_w(core: CoreType, kind: str, clock: float = 1.0) -> float:
    """Power of one busy core at a share of its full clock."""
    mhz = max(core.max_mhz * clock, core.min_mhz)
    span = max(core.max_mhz - core.min_mhz, 1e-9)
    volt = LOW_V + (TOP_V[kind] - LOW_V) * (mhz - core.min_mhz) / span
    return core.power * mhz * volt**2 * 1e-6


def power_w(phone: Phone, choice: Choice, clock: Sequence[float] = ()) -> float:
    """Power of the platform while training on ``choice``."""
    kinds = kinds_of(phone.speeds)
    cores = sum(
        count * core_power_w(core, kind, clock[i] if clock else 1.0)
        for i, (count, core, kind) in enumerate(zip(choice.counts, phone.clusters, kinds))
    )
    return BASE_W + cores


def step_energy(phone: Phone, workload: Workload, choice: Choice, beta: float) -> float:
    """Energy of a step at full clock, in watts times one-prime-core steps."""
    return step_time(phone, workload, choice, beta) * power_w(phone, choice)


def load_phone(path: Path) -> Phone:
    """Read a phone from a small JSON file with the fields of :class:`Phone`.

    Raises:
        StorageError: it cannot be read. DataError: not JSON, or not an object.
        ConfigError: a field is missing, unknown or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(path), reason, "Give a phone's JSON file") from error
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise DataError(str(path), f"not JSON ({error})", "See docs/swan.md for an example") from (
            error
        )
    if not isinstance(values, Mapping):
        raise DataError(str(path), "not a JSON object", "See docs/swan.md for an example")
    return config_from_dict(Phone, values)


SNAPDRAGON_855 = (
    CoreType(count=4, max_mhz=1785, capacity_per_mhz=488, power=232),
    CoreType(count=3, max_mhz=2419, power=369),
    CoreType(count=1, max_mhz=2841, power=421),
)
SNAPDRAGON_865 = (
    CoreType(count=4, max_mhz=1804, capacity_per_mhz=448, power=105),
    CoreType(count=3, max_mhz=2419, power=379),
    CoreType(count=1, max_mhz=2841, power=444),
)
PHONES = (
    Phone(
        name="Galaxy Tab S6",
        soc="Snapdragon 855",
        cores=SNAPDRAGON_855,
        battery_mah=7040,
        latency_ms=44,
        resistance_k_per_w=5.0,
        heat_j_per_k=150.0,
    ),
    Phone(
        name="Galaxy S10e",
        soc="Snapdragon 855",
        cores=SNAPDRAGON_855,
        battery_mah=3100,
        latency_ms=44,
    ),
    Phone(
        name="OnePlus 8",
        soc="Snapdragon 865",
        cores=SNAPDRAGON_865,
        battery_mah=4300,
        latency_ms=27,
        ram_gb=8.0,
    ),
    Phone(
        name="Xiaomi Mi 10",
        soc="Snapdragon 865",
        cores=SNAPDRAGON_865,
        battery_mah=4780,
        latency_ms=36,
        ram_gb=8.0,
    ),
    Phone(
        name="Google Pixel 3",
        soc="Snapdragon 845",
        cores=(
            CoreType(count=4, max_mhz=1766, capacity_per_mhz=611, power=154),
            CoreType(count=4, max_mhz=2500, power=442),
        ),
        battery_mah=2915,
        latency_ms=70,
        ram_gb=4.0,
    ),
)
