"""FedBuff (Nguyen et al. 2022): buffered asynchronous rounds on a simulated clock.

``concurrency`` clients train at all times, each from the weights that were current when it started.
Every ``buffer`` answers the server takes a step with their sum, an answer that is ``s`` versions
old counting ``1 / sqrt(1 + s)``, divided by the buffer's size as in the paper. Who answers when
depends on devices and not on what they learn, so a buffer's clients are known before they are
trained, and all clients of one version train as one tensor program.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check_range
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.devices import CostOf, DeviceConfig, Outcome, response_times
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.server import ServerOptimizer
from raysys.federated.core.strategy import Assignment, JobFacts, RoundReport, StateArrays

KEEP_STALENESS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AsyncConfig:
    """Asynchronous rounds; the buffer is the job's ``clients_per_round``.

    Args:
        concurrency: clients that train at any moment.
        jitter: deviation of the logarithm of a client's time around what its device predicts.
        base_s: seconds of a client's round where the population has no device columns.
        max_staleness: older answers are dropped as late.
    """

    concurrency: int = 40
    jitter: float = 0.5
    base_s: float = 1.0
    max_staleness: int = 100

    def __post_init__(self) -> None:
        check_range(self, "concurrency", 1)
        check_range(self, "jitter", 0, 5)
        check_range(self, "base_s", 0, low_open=True)
        check_range(self, "max_staleness", 0)


@dataclasses.dataclass(slots=True)
class _Clock:
    """Clients in flight as a heap of (arrival, number, client, version), and what was drawn."""

    flying: list[tuple[float, int, int, int]]
    started: int
    now_s: float

    def copy(self) -> _Clock:
        return _Clock(list(self.flying), self.started, self.now_s)


class BufferedArrivals:
    """Who is in flight, from which version, and whose answers fill the next buffer.

    Args:
        config: the clock. buffer: answers to a server step.
    """

    def __init__(self, config: AsyncConfig, buffer: int) -> None:
        self._config = config
        self._buffer = buffer
        self._clock = _Clock([], 0, 0.0)
        self._next: _Clock | None = None
        self.started_from: dict[int, int] = {}

    def check(self, population: Population) -> None:
        """Raise a ConfigError for more clients in flight than there are."""
        if self._config.concurrency > population.n_clients:
            raise ConfigError(
                "asynchronous.concurrency", self._config.concurrency,
                f"at most the population of {population.n_clients}",
            )  # fmt: skip

    def versions_of(self, clients: IntArray) -> IntArray:
        """Versions that accepted clients trained from, int64 [k]."""
        return np.array([self.started_from[c] for c in clients.tolist()], dtype=np.int64)

    def select(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        round_id: int,
    ) -> Outcome:
        """Who fills the next buffer; repeats exactly until :meth:`commit`.

        ``started_from`` then tells the version that each accepted client trained from.

        Raises:
            InfeasibleError: nearly all answers are dropped.
        """
        clock, begin = self._clock.copy(), self._clock.now_s
        accepted: list[int] = []
        late: list[int] = []
        failed: list[int] = []
        self.started_from = {}
        draw = _Arrivals(population, devices, cost_of, seed, self._config)
        busy = {client for _, _, client, _ in clock.flying}
        while len(accepted) < self._buffer:
            while len(clock.flying) < self._config.concurrency:
                draw.start(clock, round_id, busy)
            clock.now_s, number, client, version = heapq.heappop(clock.flying)
            busy.discard(client)
            if draw.fails(number):
                failed.append(client)
            elif round_id - version > self._config.max_staleness or client in self.started_from:
                late.append(client)
            else:
                accepted.append(client)
                self.started_from[client] = version
            if len(late) + len(failed) > 100 * (self._buffer + len(accepted)):
                raise InfeasibleError(
                    f"round {round_id}", "nearly all answers fail or are too old",
                    "Raise asynchronous.max_staleness or lower the failure rate",
                )  # fmt: skip
        self._next = clock
        duration_s = clock.now_s - begin
        return Outcome(_ids(accepted), _ids(late), _ids(failed), duration_s, None)

    def commit(self) -> set[int]:
        """The buffer was used; returns the versions that clients in flight started from."""
        assert self._next is not None
        self._clock, self._next = self._next, None
        return {version for _, _, _, version in self._clock.flying}

    def state(self) -> StateArrays:
        """Clients in flight, and what was drawn."""
        flying = sorted(self._clock.flying)
        return {
            "async.arrivals": np.array([row[0] for row in flying], dtype=np.float64),
            "async.flying": np.array([row[1:] for row in flying], dtype=np.int64).reshape(-1, 3),
            "async.clock": np.array([self._clock.started, self._clock.now_s], dtype=np.float64),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: it is not of asynchronous rounds.
        """
        if "async.flying" not in state:
            raise ConfigError("state", sorted(state), "a state of FedBuff")
        started, now_s = state["async.clock"].tolist()
        rows = zip(state["async.arrivals"].tolist(), state["async.flying"].tolist())
        flying = [(arrival, *map(int, row)) for arrival, row in rows]
        self._clock = _Clock(flying, int(started), float(now_s))


class FedBuff(FedAvg):
    """One model with asynchronous clients.

    Model id 0 is the newest version, ``v + 1`` is version v, from which some clients still train.
    """

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        config: AsyncConfig,
        server: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(spec, local, clients_per_round, server, "uniform")
        self._arrivals = BufferedArrivals(config, clients_per_round)
        self._history: dict[int, FlatWeights] = {}
        self._sum: npt.NDArray[np.float64] | None = None
        self.staleness: list[int] = []

    def start(self, facts: JobFacts) -> None:
        """The first version; nobody flies yet."""
        super().start(facts)
        self._arrivals.check(facts.population)
        self._history = {self._version: self.weights(0)}

    def select(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        round_id: int,
    ) -> Outcome:
        """Who fills the next buffer; repeats exactly until the round closes."""
        return self._arrivals.select(population, devices, cost_of, seed, round_id)

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """One assignment per version that somebody started from."""
        versions = self._arrivals.versions_of(clients)
        return [
            Assignment(
                clients=clients[versions == v],
                model_id=v + 1,
                version=v,
                local=self.local.at_round(v),
            )
            for v in np.unique(versions).tolist()
        ]

    def weights(self, model_id: int) -> FlatWeights:
        """Current weights (0), or those of a version that somebody still trains from."""
        return self._history[model_id - 1] if model_id else super().weights(0)

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Add the sum of one version's clients, discounted by its age."""
        age = round_id - (model_id - 1)
        part = discounted(total.delta, age)
        self._sum = part if self._sum is None else self._sum + part
        self.staleness.append(age)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step; weights that nobody started from any more are forgotten."""
        current = self._history[self._version]
        if self._sum is not None:
            current = self.server.step(current, self._sum / self.clients_per_round)
        needed = self._arrivals.commit()
        self._sum = None
        self._values = current
        self._version += 1
        self._history = {v: w for v, w in self._history.items() if v in needed}
        self._history[self._version] = current
        self.staleness = self.staleness[-KEEP_STALENESS:]

    def state(self) -> StateArrays:
        """FedAvg's state, the clients in flight, and the versions that they started from."""
        return {
            **super().state(),
            **self._arrivals.state(),
            "async.versions": np.array(list(self._history), dtype=np.int64),
            "async.weights": np.stack(list(self._history.values())),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        self._arrivals.load(state)
        super().load(state)
        versions = state["async.versions"].tolist()
        self._history = {
            int(v): np.array(w, dtype=np.float32) for v, w in zip(versions, state["async.weights"])
        }


def discounted(delta: npt.NDArray[np.float64], age: int) -> npt.NDArray[np.float64]:
    """An update that is ``age`` versions old, as much as it counts."""
    part: npt.NDArray[np.float64] = delta / np.sqrt(1.0 + age)
    return part


def _ids(clients: list[int]) -> IntArray:
    return np.array(sorted(set(clients)), dtype=np.int64)


class _Arrivals:
    """Draws who starts and when it answers, from streams numbered by starts."""

    def __init__(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        config: AsyncConfig,
    ) -> None:
        self._population = population
        self._devices = devices
        self._cost_of = cost_of
        self._seed = seed
        self._config = config

    def start(self, clock: _Clock, version: int, busy: set[int]) -> None:
        """Start one client that is not busy, at the clock's moment."""
        rng = generator(self._seed, Purpose.SELECTION, clock.started)
        client = int(rng.integers(self._population.n_clients))
        while client in busy:
            client = int(rng.integers(self._population.n_clients))
        predicted = float(response_times(self._population, np.array([client]), self._cost_of)[0])
        spent = (predicted or self._config.base_s) * float(
            np.exp(self._config.jitter * rng.standard_normal())
        )
        busy.add(client)
        heapq.heappush(clock.flying, (clock.now_s + spent, clock.started, client, version))
        clock.started += 1

    def fails(self, number: int) -> bool:
        """Whether the client that started as ``number`` never answers."""
        rng = generator(self._seed, Purpose.FAULTS, number)
        return float(rng.random()) < self._devices.failure_rate
