"""A simulated phone that obeys the SoC model, driven by the same pilot as a real device.

Adds to the model of a step: noise, the owner's work, heat with clock caps, battery and charger.
The clock is the simulation's own; a year takes seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raysys.config import check_range
from raysys.federated.swan.choices import Choice, cost_of, enumerate_choices
from raysys.federated.swan.energy import Battery
from raysys.federated.swan.frontier import Estimate
from raysys.federated.swan.interference import Demand
from raysys.federated.swan.pilot import Change, Pilot, Policy, Step
from raysys.federated.swan.soc import Phone, Workload, power_w, step_energy, step_time

NOISE = 0.05
CAP_FROM_C = 43.0
SAMPLE_S = 0.25
SOURCE = "SoC model"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What happens around the training, as functions of the time in seconds.

    Args:
        owner: share of each core that the owner's work takes, by cluster, slowest first.
        charging_w: power of the charger, 0 when unplugged.
        drain_w: the owner's own use of the battery.
        ambient_c: temperature around the phone.
    """

    owner: Callable[[float], Sequence[float]] | None = None
    charging_w: Callable[[float], float] | None = None
    drain_w: float = 0.3
    ambient_c: float = 22.0

    def __post_init__(self) -> None:
        check_range(self, "drain_w", 0)
        check_range(self, "ambient_c", -40, 60)


@dataclasses.dataclass(slots=True)
class Totals:
    """What a simulation added up."""

    steps: int = 0
    training_s: float = 0.0
    paused_s: float = 0.0
    joules: float = 0.0
    hottest_c: float = 0.0
    moves: list[tuple[float, str, str]] = dataclasses.field(default_factory=list)
    lowest_level: float = 1.0
    largest_loan: float = 0.0


class SimulatedPhone:
    """A phone with a task under a policy.

    Args:
        unit_s: seconds of a one-prime-core step of the task on the reference phone.
        sample_s: time between the pilot's looks at the owner, heat and supply.
        battery: whether supply limits apply; without, it is always on external power.
    """

    def __init__(
        self,
        phone: Phone,
        workload: Workload,
        beta: float,
        policy: Policy,
        *,
        surroundings: Surroundings | None = None,
        unit_s: float = 1.0,
        sample_s: float = SAMPLE_S,
        battery: bool = False,
        seed: int = 0,
        pilot: Pilot | None = None,
    ) -> None:
        self.phone, self.workload, self.beta = phone, workload, beta
        self.surroundings = surroundings or Surroundings()
        topology = phone.topology()
        wh = phone.battery_wh if battery else 0.0
        self.pilot = pilot or Pilot(topology, policy, wh)
        self.now_s = 0.0
        self.celsius = self.surroundings.ambient_c
        self.level = 1.0
        self.totals = Totals()
        self.unit_s = unit_s / phone.rate
        self._battery = battery
        self._sample_s = sample_s
        self._rng = np.random.default_rng(seed)
        self._next_sample_s = 0.0

    def step(self) -> float:
        """Run one step (or, when paused, wait for one sample); returns its seconds."""
        choice = self.pilot.choice
        if choice is None:
            return self._wait()
        clock = self._clock(choice)
        owner = self._owner()
        taken = sum(share * speed for share, speed in zip(owner, self.phone.speeds))
        units = step_time(
            self.phone,
            self.workload,
            choice,
            self.beta,
            clock=clock,
            stolen=owner,
            stolen_bandwidth=min(taken / 2.0, 0.9),
        )
        seconds = self.unit_s * units * float(np.exp(NOISE * self._rng.standard_normal()))
        watts = power_w(self.phone, choice, clock)
        self._advance(seconds, watts)
        self.totals.steps += 1
        self.totals.training_s += seconds
        self.totals.joules += watts * seconds
        lowest = min(c for c, count in zip(clock, choice.counts) if count)
        done = Step(seconds=seconds, joules=watts * seconds, source=SOURCE, clock=lowest)
        self._apply(self.pilot.on_step(self.now_s, done))
        return seconds

    def run(self, *, steps: int | None = None, until_s: float = math.inf) -> Totals:
        """Run so many steps, or until a moment of the simulated clock."""
        while (steps is None or self.totals.steps < steps) and self.now_s < until_s:
            self.step()
        return self.totals

    def expected_s(self, choice: Choice) -> float:
        """Noise-free time of a cool, undisturbed step."""
        return self.unit_s * step_time(self.phone, self.workload, choice, self.beta)

    def oracle(self) -> Choice:
        """The choice with the least expected time."""
        return min(enumerate_choices(self.pilot.topology), key=self.expected_s)

    def _wait(self) -> float:
        self._advance(1.0, 0.0)
        self.totals.paused_s += 1.0
        return 1.0

    def _owner(self) -> Sequence[float]:
        if self.surroundings.owner is None:
            return [0.0] * len(self.phone.speeds)
        return self.surroundings.owner(self.now_s)

    def _clock(self, choice: Choice) -> list[float]:
        """Clock caps: 10 % for every 2 K above the first cap, not below 40 %."""
        cap = 1.0 - 0.1 * math.ceil(max(self.celsius - CAP_FROM_C, 0.0) / 2.0)
        return [max(cap, 0.4)] * len(choice.counts)

    def _advance(self, seconds: float, watts: float) -> None:
        """Let time pass in samples: heat, battery, loan, and the pilot's eyes on the owner."""
        left = seconds
        while left > 1e-12:
            part = min(left, self._sample_s if watts else max(self._sample_s, 1.0))
            left -= part
            self.now_s += part
            self._heat(part, watts)
            self._supply(part, watts)
            if self.now_s >= self._next_sample_s:
                self._next_sample_s = self.now_s + self._sample_s
                self._sample()

    def _heat(self, seconds: float, watts: float) -> None:
        resistance, capacity = self.phone.resistance_k_per_w, self.phone.heat_j_per_k
        lost = (self.celsius - self.surroundings.ambient_c) / resistance
        self.celsius += (watts - lost) / capacity * seconds
        self.totals.hottest_c = max(self.totals.hottest_c, self.celsius)

    def _supply(self, seconds: float, watts: float) -> None:
        if not self._battery:
            return
        charger = self.surroundings.charging_w
        coming = charger(self.now_s) if charger is not None else 0.0
        use = watts + self.surroundings.drain_w
        change = (coming - use) * seconds / (3600.0 * self.phone.battery_wh)
        self.level = min(max(self.level + change, 0.0), 1.0)
        self.totals.lowest_level = min(self.totals.lowest_level, self.level)
        self.pilot.loan.repay(max(coming - use, 0.0) * seconds, self._state(coming))
        self.totals.largest_loan = max(self.totals.largest_loan, self.pilot.loan.loan_j)

    def _state(self, coming_w: float) -> Battery:
        drain = self.surroundings.drain_w
        return Battery(level=self.level, external=coming_w > 0, drain_w=drain)

    def _sample(self) -> None:
        owner = self._owner()
        shares = {
            core: share
            for share, cluster in zip(owner, self.pilot.topology.clusters)
            for core in cluster.cores
        }
        charger = self.surroundings.charging_w
        battery = Battery()
        if self._battery:
            battery = self._state(charger(self.now_s) if charger is not None else 0.0)
        demand = Demand(shares=shares)
        self._apply(self.pilot.on_sample(self.now_s, demand, self.celsius, battery))

    def _apply(self, change: Change | None) -> None:
        if change is None:
            return
        choice = change.choice
        label = choice.label(self.pilot.topology) if choice is not None else "pause"
        self.totals.moves.append((self.now_s, label, change.reason))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exploration:
    """What one exploration came to, without the noise of its steps.

    Args:
        settled: the choice at its end. gap: its time over the oracle's, less one.
        steps: steps that it took. excess_s, excess_j: their time and energy beyond those of as
            many steps on the settled choice, in units of ``unit_s`` (1 on the reference phone).
    """

    settled: Choice
    gap: float
    steps: int
    excess_s: float
    excess_j: float


def explore(
    phone: Phone,
    workload: Workload,
    beta: float,
    seed: int = 0,
    *,
    shared: bool = False,
    most_steps: int = 200,
) -> Exploration:
    """Let the pilot explore on a cool phone; with ``shared`` it only verifies others' profile."""
    cool = dataclasses.replace(phone, heat_j_per_k=1e9)
    known = shared_profile(phone, workload, beta) if shared else None
    pilot = Pilot(phone.topology(), Policy(), shared=known)
    simulated = SimulatedPhone(cool, workload, beta, Policy(), seed=seed, pilot=pilot)
    taken: list[Choice] = []
    while pilot.exploring and len(taken) < most_steps:
        assert pilot.choice is not None
        taken.append(pilot.choice)
        simulated.step()
    settled = pilot.choice
    assert settled is not None
    best_s, best_w = simulated.expected_s(settled), power_w(phone, settled)
    times = [simulated.expected_s(choice) for choice in taken]
    joules = sum(t * power_w(phone, choice) for t, choice in zip(times, taken))
    return Exploration(
        settled=settled,
        gap=best_s / simulated.expected_s(simulated.oracle()) - 1,
        steps=len(taken),
        excess_s=sum(times) - len(taken) * best_s,
        excess_j=joules - len(taken) * best_s * best_w,
    )


def model_estimates(phone: Phone, workload: Workload, beta: float) -> list[Estimate]:
    """All choices of a phone as the model has them, in its own one-prime-core steps."""
    topology = phone.topology()
    return [
        Estimate(
            choice=choice,
            cost=cost_of(choice, topology),
            seconds=step_time(phone, workload, choice, beta),
            joules=step_energy(phone, workload, choice, beta),
            source=SOURCE,
            steps=1,
        )
        for choice in enumerate_choices(topology)
    ]


def shared_profile(phone: Phone, workload: Workload, beta: float) -> dict[str, Any]:
    """The profile that other phones of the kind would share."""
    pilot = Pilot(phone.topology())
    for item in model_estimates(phone, workload, beta):
        pilot.profile.of(item.choice).add(item.seconds / phone.rate, math.nan, SOURCE)
    return pilot.profile.to_plain()
