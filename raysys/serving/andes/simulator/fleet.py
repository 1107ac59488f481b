"""Several simulated engines behind a router, in one virtual time.

The router is the one of the real endpoint (:mod:`raysys.serving.andes.routing`): it sees statistics
that are as old as they are there, and remembers what it sent since. The baseline is Ray Serve's
power of two choices with exact queue lengths, which is more than it has in reality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from raysys.config import check_choice, check_range
from raysys.errors import ConfigError
from raysys.serving.andes.load import replica_load
from raysys.serving.andes.qoe import final_qoe
from raysys.serving.andes.routing import (
    ReplicaLoad,
    RoutingConfig,
    SentRequests,
    rank_replicas,
)
from raysys.serving.andes.simulator.engine import EngineConfig, Policy, SimEngine
from raysys.serving.andes.simulator.workload import Workload
from raysys.serving.andes.snapshot import FloatArray, IntArray

RouterName = Literal["qoe", "power_of_two", "round_robin"]
ROUTERS: tuple[RouterName, ...] = ("qoe", "power_of_two", "round_robin")


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """The router of a simulated fleet.

    Args:
        router: which one.
        routing: options of the QoE router.
        stats_period_s: how often a replica's statistics reach the router.
        seed: of the power of two choices.
    """

    router: RouterName = "qoe"
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    stats_period_s: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "router", ROUTERS)
        check_range(self, "stats_period_s", 0.0)


@dataclass(frozen=True, slots=True)
class FleetResult:
    """Outcome of a run.

    Args:
        qoe: (R,) final scores in order of arrival.
        replica: (R,) where each request went.
        ttft_s: (R,) seconds to the first token.
        throughput: output tokens per second from the first arrival to the last token.
    """

    qoe: FloatArray
    replica: IntArray
    ttft_s: FloatArray
    throughput: float

    @property
    def mean_qoe(self) -> float:
        return float(self.qoe.mean()) if self.qoe.size else 1.0


class FleetEngine(SimEngine):
    """An engine that is told of each request when a router has chosen it."""

    def __init__(self, workload: Workload, config: EngineConfig, policy: Policy) -> None:
        super().__init__(workload, config, policy)
        self._inbox: list[int] = []
        self._until_s: float | None = None

    def next_arrival_s(self) -> float | None:
        """The next routed request, or how far the fleet's time is known."""
        if self._inbox:
            return float(self.workload.arrival_s[self._inbox[0]])
        return self._until_s

    def _arrive(self) -> None:
        while self._inbox and self.workload.arrival_s[self._inbox[0]] <= self.now_s:
            self.accept(self._inbox.pop(0))
        self.stats.peak_waiting = max(self.stats.peak_waiting, len(self.waiting))

    def submit(self, request: int) -> None:
        """The router chose this engine."""
        self._inbox.append(request)

    def advance(self, until_s: float | None) -> None:
        """Serve until a time, or to the end; the last step may end a little later."""
        self._until_s = until_s
        while (self.busy or self._inbox) and (until_s is None or self.now_s < until_s):
            self.turn()
        if until_s is not None:
            self.now_s = max(self.now_s, until_s)

    @property
    def live(self) -> int:
        """Requests inside, the queue length that a balancer sees."""
        return len(self.table) + len(self._inbox)

    def load(self) -> ReplicaLoad:
        """What the engine's scheduler would report now."""
        slots = self.table.live_slots()
        snapshot = self.table.snapshot(
            self.now_s,
            slots,
            capacity_tokens=self.config.kv_tokens,
            free_tokens=self.free_tokens,
            max_batch=self.config.max_batch,
            step_tokens=self.config.step_tokens,
        )
        return replica_load(snapshot, self.config.step_time)


def simulate_fleet(
    workload: Workload,
    machines: Sequence[EngineConfig],
    make_policy: Callable[[EngineConfig], Policy],
    config: FleetConfig | None = None,
) -> FleetResult:
    """Route and serve every request of ``workload`` to completion; deterministic.

    Args:
        machines: one configuration per replica; they may be unequal.
        make_policy: the scheduler of each engine.

    Raises:
        ConfigError: no machine.
        InfeasibleError: a request fits no KV room.
    """
    if not machines:
        raise ConfigError("machines", len(machines), "at least one")
    config = config or FleetConfig()
    engines = [FleetEngine(workload, machine, make_policy(machine)) for machine in machines]
    router = _Router(config, engines)
    replica = np.zeros(workload.size, dtype=np.int64)
    for request in range(workload.size):
        now = float(workload.arrival_s[request])
        for engine in engines:
            engine.advance(now)
        replica[request] = router.choose(workload, request, now)
        engines[replica[request]].submit(request)
    for engine in engines:
        engine.advance(None)
    return _collect(workload, engines, replica)


class _Router:
    def __init__(self, config: FleetConfig, engines: Sequence[FleetEngine]) -> None:
        self._config = config
        self._engines = engines
        self._random = np.random.default_rng(config.seed)
        self._loads: list[ReplicaLoad] = []
        self._seen_s = -np.inf
        self._now_s = 0.0
        self._sent = SentRequests(lambda: self._now_s)

    def choose(self, workload: Workload, request: int, now_s: float) -> int:
        if self._config.router == "round_robin":
            return request % len(self._engines)
        if self._config.router == "power_of_two":
            return self._shorter_of_two()
        self._now_s = now_s
        if now_s - self._seen_s >= self._config.stats_period_s:
            self._loads = [engine.load() for engine in self._engines]
            self._seen_s = now_s
        spec, prompt = workload.spec(request), float(workload.prompt_tokens[request])
        known = [self._sent.known_load(str(index), load) for index, load in enumerate(self._loads)]
        best = rank_replicas(known, spec, prompt, self._config.routing)[0]
        self._sent.note(str(best), spec, prompt)
        return best

    def _shorter_of_two(self) -> int:
        count = min(2, len(self._engines))
        pair = self._random.choice(len(self._engines), size=count, replace=False)
        return int(min(pair, key=lambda index: self._engines[index].live))


def _collect(workload: Workload, engines: Sequence[FleetEngine], replica: IntArray) -> FleetResult:
    size = workload.size
    which = (replica, np.arange(size))
    final = np.stack([engine.final[:, :size] for engine in engines])  # (E, 3, R)
    tokens, lag, delay = (final[:, row][which] for row in range(3))
    first = np.stack([engine.first_s[:size] for engine in engines])[which]
    end = max(float(engine.finish_s[:size].max(initial=0.0)) for engine in engines)
    start = float(workload.arrival_s[0]) if size else 0.0
    return FleetResult(
        qoe=final_qoe(tokens, lag, delay, workload.tau_s),
        replica=replica,
        ttft_s=first - workload.arrival_s,
        throughput=workload.output_total / max(1e-9, end - start),
    )
