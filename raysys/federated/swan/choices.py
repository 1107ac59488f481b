"""Execution choices, and what each takes away from the device's owner.

Cores of a cluster are interchangeable, so a choice is a count per cluster . The
cost orders choices by how much of the scarcest resource they take: a faster core weighs more than
any number of slower ones, then fewer cores weigh less (3.3).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from raysys.config import check, check_choice
from raysys.federated.swan.topology import Cluster, Topology

ALL_COUNTS_UP_TO = 8

Cost = tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceConfig:
    """Which choices exist and how they are ordered.

    Args:
        allow_mixed: also little cores together with faster ones. Off: OpenMP splits loops evenly,
            so that the slowest core sets the pace.
        reserve_ui_core: leave one core of the fastest cluster alone.
        cost: "lexicographic", or "weighted": the sum over cores of their speed squared.
        bandwidth: add the share of memory bandwidth as the last component of the cost.
    """

    allow_mixed: bool = False
    reserve_ui_core: bool = False
    cost: str = "lexicographic"
    bandwidth: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "cost", ("lexicographic", "weighted"))
        check(self, "bandwidth", isinstance(self.bandwidth, bool), "true or false")


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A set of cores with one thread each.

    Args:
        counts: cores of each cluster, slowest cluster first.
        cores: their ids.
    """

    counts: tuple[int, ...]
    cores: tuple[int, ...]

    @property
    def threads(self) -> int:
        """Number of threads: one per core."""
        return len(self.cores)

    def label(self, topology: Topology) -> str:
        """In words, fastest first: ``3 big + 1 prime``."""
        pairs = zip(self.counts, topology.clusters)
        parts = [f"{count} {cluster.kind}" for count, cluster in pairs if count]
        return " + ".join(parts)


def enumerate_choices(topology: Topology, config: ChoiceConfig | None = None) -> list[Choice]:
    """All choices of a device, cheapest first.

    Counts above 8 in one cluster grow by half an octave, so that a server with hundreds of cores
    still has a handful of choices. No choice has more threads than the control group's quota
    grants (rounded up), save that one core always remains.

    Returns:
        At least one choice; 11 for 4 little + 3 big + 1 prime, 8 for 4 + 4.
    """
    settings = config or ChoiceConfig()
    pools = [list(cluster.cores) for cluster in topology.clusters]
    if settings.reserve_ui_core and sum(map(len, pools)) > 1:
        pools[-1] = pools[-1][:-1] if topology.clusters[-1].physical < 2 else pools[-1][1:]
    most = math.inf if math.isinf(topology.quota) else max(math.ceil(topology.quota), 1)
    found = []
    for counts in itertools.product(*(_counts(len(pool)) for pool in pools)):
        if not 0 < sum(counts) <= most:
            continue
        if not settings.allow_mixed and _is_mixed(counts, topology.clusters):
            continue
        cores = tuple(core for pool, count in zip(pools, counts) for core in pool[:count])
        found.append(Choice(counts, cores))
    return sorted(found, key=lambda choice: cost_of(choice, topology, settings))


def cost_of(choice: Choice, topology: Topology, config: ChoiceConfig | None = None) -> Cost:
    """What a choice takes from the owner; tuples compare, larger is dearer."""
    settings = config or ChoiceConfig()
    pairs = list(zip(choice.counts, topology.clusters))
    if settings.cost == "weighted":
        cost: Cost = (sum(count * cluster.speed**2 for count, cluster in pairs),)
    else:
        cost = tuple(float(count) for count, _ in reversed(pairs))
    if settings.bandwidth:
        cost += (sum(count * cluster.speed for count, cluster in pairs),)
    return cost


def greedy_choice(topology: Topology, config: ChoiceConfig | None = None) -> Choice:
    """All cores that are not little: what a training library's default amounts to."""
    choices = enumerate_choices(topology, config)
    return max(choices, key=lambda choice: (_is_fast(choice, topology), choice.threads))


def slowest_speed(choice: Choice, topology: Topology) -> float:
    """Relative speed of the choice's slowest core, which sets the pace."""
    return min(c.speed for count, c in zip(choice.counts, topology.clusters) if count)


def _is_fast(choice: Choice, topology: Topology) -> bool:
    return slowest_speed(choice, topology) >= _fast_from(topology)


def _fast_from(topology: Topology) -> float:
    fast = [cluster.speed for cluster in topology.clusters if cluster.kind != "little"]
    return min(fast, default=0.0)


def _counts(size: int) -> list[int]:
    counts = list(range(min(size, ALL_COUNTS_UP_TO) + 1))
    while counts[-1] < size:
        counts.append(min(size, math.ceil(counts[-1] * 1.5)))
    return counts


def _is_mixed(counts: tuple[int, ...], clusters: tuple[Cluster, ...]) -> bool:
    kinds = {cluster.kind for count, cluster in zip(counts, clusters) if count}
    return "little" in kinds and len(kinds) > 1
