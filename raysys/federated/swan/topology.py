"""What cores a device has: clusters of equal cores, slowest first.

The paper tells little, big and prime cores apart; here a cluster is any group of cores of equal
speed, so that phones, hybrid desktop processors and equal server cores are one case.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from raysys.errors import ConfigError

LITTLE_BELOW = 0.7  # a cluster slower than this share of the fastest counts as little


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Cores of equal speed.

    Args:
        cores: core ids in the order in which they are used: one thread of each physical core
            first, then their SMT siblings.
        speed: full-clock speed relative to the fastest cluster of the device, in (0, 1].
        kind: "little", "big" or "prime".
        max_mhz: full clock; 0 where the kernel does not tell.
        physical: number of physical cores; 0 means all of ``cores``.
    """

    cores: tuple[int, ...]
    speed: float = 1.0
    kind: str = "big"
    max_mhz: float = 0.0
    physical: int = 0

    def __post_init__(self) -> None:
        if not self.cores or len(set(self.cores)) != len(self.cores) or min(self.cores) < 0:
            raise ConfigError("cluster.cores", self.cores, "different core ids, at least one")
        if not (math.isfinite(self.speed) and 0 < self.speed <= 1):
            raise ConfigError("cluster.speed", self.speed, "a number in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """A device's usable cores.

    Args:
        clusters: slowest first.
        quota: most cores' worth of time that a control group grants; infinite without a limit.
        device: identifier of the processor, part of the key of shared profiles.
        notes: what discovery could not read, in words.
    """

    clusters: tuple[Cluster, ...]
    quota: float = math.inf
    device: str = "unknown"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cores = [core for cluster in self.clusters for core in cluster.cores]
        if not cores or len(set(cores)) != len(cores):
            raise ConfigError("topology.clusters", self.clusters, "disjoint clusters, at least one")
        if not self.quota > 0:
            raise ConfigError("topology.quota", self.quota, "a positive number of cores")

    @property
    def cores(self) -> tuple[int, ...]:
        """All usable cores, slowest cluster first."""
        return tuple(core for cluster in self.clusters for core in cluster.cores)

    def without(self, gone: Collection[int]) -> Topology:
        """The topology after cores were unplugged or taken away.

        Raises:
            ConfigError: nothing would be left.
        """
        clusters = []
        for cluster in self.clusters:
            kept = tuple(core for core in cluster.cores if core not in gone)
            if kept:
                physical = min(cluster.physical, len(kept))
                clusters.append(dataclasses.replace(cluster, cores=kept, physical=physical))
        return dataclasses.replace(self, clusters=tuple(clusters))


def group_cores(
    capacity: Sequence[tuple[int, float]],
    siblings: Sequence[tuple[int, ...]] = (),
    max_mhz: float = 0.0,
) -> tuple[Cluster, ...]:
    """Group cores by capacity into clusters, slowest first, and name their kinds.

    Args:
        capacity: (core id, capacity) of every usable core; any positive unit. Capacities within
            2 % of each other count as equal: kernels round them.
        siblings: groups of core ids that share a physical core (SMT).
        max_mhz: clock of the fastest core, when known.

    Raises:
        ConfigError: no cores, or a capacity that is not positive.
    """
    for core, value in capacity:
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"core {core}", value, "a positive capacity")
    ordered = sorted(capacity, key=lambda pair: (pair[1], pair[0]))
    groups: list[list[tuple[int, float]]] = []
    for core, value in ordered:
        if groups and value <= 1.02 * groups[-1][0][1]:
            groups[-1].append((core, value))
        else:
            groups.append([(core, value)])
    if not groups:
        raise ConfigError("topology", 0, "at least one usable core")
    top = groups[-1][-1][1]
    speeds = [min(group[-1][1] / top, 1.0) for group in groups]
    kinds = kinds_of(speeds)
    clusters = []
    for group, speed, kind in zip(groups, speeds, kinds):
        cores = sorted(core for core, _ in group)
        first, rest = _one_thread_first(cores, siblings)
        clusters.append(
            Cluster(
                cores=tuple(first + rest),
                speed=speed,
                kind=kind,
                max_mhz=max_mhz * speed,
                physical=len(first),
            )
        )
    return tuple(clusters)


def kinds_of(speeds: Sequence[float]) -> list[str]:
    """Kind of each cluster, given relative speeds in rising order."""
    fast = [speed for speed in speeds if speed >= LITTLE_BELOW]
    kinds = []
    for speed in speeds:
        if speed < LITTLE_BELOW:
            kinds.append("little")
        else:
            kinds.append("prime" if len(fast) > 1 and speed == fast[-1] else "big")
    return kinds


def _one_thread_first(
    cores: list[int], siblings: Sequence[tuple[int, ...]]
) -> tuple[list[int], list[int]]:
    seen: set[tuple[int, ...]] = set()
    first: list[int] = []
    rest: list[int] = []
    group_of = {core: tuple(sorted(group)) for group in siblings for core in group}
    for core in cores:
        group = group_of.get(core, (core,))
        (rest if group in seen else first).append(core)
        seen.add(group)
    return first, rest
