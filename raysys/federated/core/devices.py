"""Simulated devices of a round: who answers in time, who is late, who vanishes.

Compute time is multiply-accumulates over the device's rate, communication is bytes over its
bandwidth. A round starts more devices than it needs and closes at the answer that completes the
demand, or at its deadline; answers after that are dropped, and never trained here at all. The bias
of dropping slow devices is reported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_range
from raysys.errors import InfeasibleError
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.strategy import Demand

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
CostOf = Callable[[IntArray], tuple[FloatArray, int]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceConfig:
    """How devices behave.

    Args:
        overcommit: devices started per answer wanted; 1 starts exactly the demand.
        failure_rate: share of started devices that never answer.
        deadline_s: longest simulated duration of a round; None waits.
    """

    overcommit: float = 1.0
    failure_rate: float = 0.0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "overcommit", 1, 100)
        check_range(self, "failure_rate", 0, 1, high_open=True)
        if self.deadline_s is not None:
            check(self, "deadline_s", self.deadline_s > 0, "None or a number above 0")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Who did what: ids by fate, the round's simulated duration, and the capacity bias.

    ``capacity_bias`` is the mean device rate of accepted over that of all started devices; below
    1 never, above 1 where slow devices were dropped; None without device rates.
    """

    accepted: IntArray
    late: IntArray
    failed: IntArray
    duration_s: float
    capacity_bias: float | None


def play_devices(
    population: Population,
    demands: list[Demand],
    config: DeviceConfig,
    cost_of: CostOf,
    seed: int,
    round_id: int,
    attempt: int,
    time_s: float = 0.0,
) -> Outcome:
    """Start devices for a round's demands and see which answers are accepted.

    Args:
        cost_of: multiply-accumulates of each client, and bytes of the model one way.
        time_s: simulated moment at which the round opens, for availability.

    Raises:
        InfeasibleError: fewer suitable devices are there than are needed.
    """
    parts = []
    taken = np.empty(0, dtype=np.int64)
    for number, demand in enumerate(demands):
        pool = _pool(population, demand, time_s, taken)
        size = population.n_clients if pool is None else len(pool)
        if demand.clients > size:
            raise InfeasibleError(
                f"{demand.clients} clients in round {round_id}", f"only {size} are suitable",
                "Lower clients_per_round, or the needs of the stream",
            )  # fmt: skip
        offered = min(size, demand.clients + demand.spare)
        n = min(size, math.ceil(offered * config.overcommit))
        rng = generator(seed, Purpose.SELECTION, round_id, attempt * 1000 + number)
        drawn = rng.choice(size, size=n, replace=False, shuffle=False).astype(np.int64)
        started = np.sort(drawn if pool is None else pool[drawn])
        taken = np.concatenate([taken, started])
        parts.append(_play(population, started, offered, config, cost_of, rng))
    if len(parts) == 1:
        return parts[0]
    biases = [part.capacity_bias for part in parts if part.capacity_bias is not None]
    return Outcome(
        np.concatenate([part.accepted for part in parts]),
        np.concatenate([part.late for part in parts]),
        np.concatenate([part.failed for part in parts]),
        max(part.duration_s for part in parts),
        float(np.mean(biases)) if biases else None,
    )


def response_times(population: Population, clients: IntArray, cost_of: CostOf) -> FloatArray:
    """Simulated seconds from start to answer of each client; 0 without device columns."""
    macs, model_bytes = cost_of(clients)
    times = np.zeros(len(clients))
    if population.rate_mac_s is not None:
        times += macs / population.rate_mac_s[clients]
    if population.bandwidth_bytes_s is not None:
        times += 2.0 * model_bytes / population.bandwidth_bytes_s[clients]
    return times


def _pool(
    population: Population, demand: Demand, time_s: float, taken: IntArray
) -> IntArray | None:
    """Ids that suit a demand, or None for "all": then nothing of the population's size is made."""
    checks = []
    if population.availability is not None:
        checks.append(population.availability.available(time_s))
    if demand.min_mac_s > 0 and population.rate_mac_s is not None:
        checks.append(population.rate_mac_s >= demand.min_mac_s)
    if demand.min_memory_bytes > 0 and population.memory_bytes is not None:
        checks.append(population.memory_bytes >= demand.min_memory_bytes)
    if not checks and not len(taken):
        return None
    suitable = np.ones(population.n_clients, dtype=bool)
    for mask in checks:
        suitable &= mask
    suitable[taken] = False
    return np.flatnonzero(suitable)


def _play(
    population: Population,
    started: IntArray,
    wanted: int,
    config: DeviceConfig,
    cost_of: CostOf,
    rng: np.random.Generator,
) -> Outcome:
    fails = rng.random(len(started)) < config.failure_rate
    times = response_times(population, started, cost_of)
    in_time = ~fails
    if config.deadline_s is not None:
        in_time &= times <= config.deadline_s
    order = np.lexsort((started, times))
    answered = order[in_time[order]]
    accepted = answered[:wanted]
    closed_by_deadline = len(accepted) < wanted and config.deadline_s is not None
    duration = float(times[accepted].max(initial=0.0))
    if closed_by_deadline:
        assert config.deadline_s is not None
        duration = config.deadline_s
    bias = None
    if population.rate_mac_s is not None and len(accepted):
        rates = population.rate_mac_s
        bias = float(rates[started[accepted]].mean() / rates[started].mean())
    late = ~fails
    late[accepted] = False
    return Outcome(np.sort(started[accepted]), started[late], started[fails], duration, bias)
