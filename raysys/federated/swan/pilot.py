"""One device's decisions: explore, then hold the best place on the frontier, and tell why.

The pilot is fed with steps and samples and answers with the choice to run on. The real engine and
the simulated phones drive the same object, so what is shown on one holds for the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raysys.config import check, check_choice
from raysys.errors import ConfigError
from raysys.federated.swan.choices import (
    Choice,
    ChoiceConfig,
    cost_of,
    enumerate_choices,
    greedy_choice,
)
from raysys.federated.swan.controller import PAUSE, Controller, ControllerConfig, Situation
from raysys.federated.swan.energy import Battery, EnergyLoan, LoanConfig
from raysys.federated.swan.exploration import ExplorationConfig, Explorer
from raysys.federated.swan.frontier import Estimate, best_index, prune
from raysys.federated.swan.heat import HeatConfig, HeatWatch
from raysys.federated.swan.interference import Demand, Detector, InterferenceConfig, Level
from raysys.federated.swan.profile import StepProfile, check_plain
from raysys.federated.swan.topology import Topology

POLICIES = ("swan", "greedy", "fixed")
VERIFY_STEPS = 6
SELF_CALIBRATION_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How a task may use the device.

    Args:
        kind: "swan"; "greedy" stays on all fast cores, "fixed" on ``fixed`` threads: baselines.
        fixed: number of threads for "fixed", taken from the fastest cores.
        energy: mind the energy loan and drop choices that lose in time and energy.
        deterministic: never change the number of threads, only the cores: bitwise repeatable.
        strict: a step gives way before it has ended: loops that ask the task for micro-batches get
            ``parts`` of them, and moves and pauses take full effect between two.
    """

    kind: str = "swan"
    fixed: int = 1
    energy: bool = True
    deterministic: bool = False
    strict: bool = False
    parts: int = 4
    choices: ChoiceConfig = dataclasses.field(default_factory=ChoiceConfig)
    exploration: ExplorationConfig = dataclasses.field(default_factory=ExplorationConfig)
    interference: InterferenceConfig = dataclasses.field(default_factory=InterferenceConfig)
    controller: ControllerConfig = dataclasses.field(default_factory=ControllerConfig)
    heat: HeatConfig = dataclasses.field(default_factory=HeatConfig)
    loan: LoanConfig = dataclasses.field(default_factory=LoanConfig)
    verify_tolerance: float = 0.15

    def __post_init__(self) -> None:
        check_choice(self, "kind", POLICIES)
        check(self, "fixed", self.fixed >= 1, "at least 1 thread")
        check(self, "parts", self.parts >= 1, "at least 1 micro-batch")
        check(self, "verify_tolerance", 0 < self.verify_tolerance < 1, "a share in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A finished step.

    Args:
        seconds: its time. joules: its energy, NaN when unknown; ``source`` says where it is from.
        clock: current over full clock of the cores used, 1 when unknown.
    """

    seconds: float
    joules: float = math.nan
    source: str = "none"
    clock: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """The engine shall run on ``choice`` from now on, or pause where it is None."""

    choice: Choice | None
    reason: str


class Pilot:
    """Decides for one task.

    Args:
        battery_wh: usable energy of the battery, 0 without one.
        shared: a profile from other devices of the same kind; verified before it is trusted.
        trusted: the profile is this device's own: nothing is verified or explored again.

    Raises:
        ConfigError: the shared profile is malformed.
    """

    def __init__(
        self,
        topology: Topology,
        policy: Policy | None = None,
        battery_wh: float = 0.0,
        shared: Mapping[str, Any] | None = None,
        trusted: bool = False,
    ) -> None:
        self.topology = topology
        self.policy = policy or Policy()
        self.loan = EnergyLoan(battery_wh, self.policy.loan)
        self.heat = HeatWatch(self.policy.heat)
        self.detector = Detector(self.policy.interference)
        self.controller = Controller(self.policy.controller)
        self.battery = Battery()
        self.steps = 0
        self.exploration_steps = 0
        self.verified: bool | None = None
        choices = self._choices()
        self.profile = StepProfile(topology, choices, self.policy.choices)
        self.explorer = Explorer(self.profile, self.policy.exploration)
        self.frontier: list[Estimate] = []
        self._to_verify: list[tuple[Choice, float]] = []
        self._verify_times: list[float] = []
        if shared is not None and self.policy.kind == "swan":
            self._plan_verification(check_plain(shared), trusted)
        self.choice: Choice | None = None
        if trusted and self.explorer.done:
            self._rebuild(0.0)
        else:
            self.choice = self._first()

    @property
    def exploring(self) -> bool:
        """Whether the best choice is still being looked for."""
        return self.policy.kind == "swan" and (bool(self._to_verify) or not self.explorer.done)

    def on_step(self, now_s: float, step: Step) -> Change | None:
        """Take a finished step; returns a change of cores, if there is to be one.

        Raises:
            ConfigError: a step time that is not a positive finite number.
        """
        self.steps += 1
        self.loan.spend(now_s, step.joules, self.battery)
        if self.policy.kind != "swan" or self.choice is None:
            return None
        if self.exploring:
            return self._explore(now_s, step)
        return self._hold(now_s, step)

    def on_sample(
        self,
        now_s: float,
        demand: Demand,
        celsius: float = math.nan,
        battery: Battery | None = None,
    ) -> Change | None:
        """Take a sample of others' demand, temperature and supply, whether or not a step runs."""
        self.heat.read(celsius)
        self.battery = battery or self.battery
        if self.policy.kind != "swan":
            return None
        watched = self.choice or self._cheapest()
        level = self.detector.sample(now_s, demand, watched)
        if self.exploring:
            return self._guard_exploration(now_s, level)
        aside = self._sidestep(level)
        if aside is not None:
            return aside
        return self._decide(now_s, level)

    def drop(self, choice: Choice, reason: str, now_s: float) -> Change | None:
        """A choice cannot be used (refused, gone, out of memory): leave it at once.

        The last one that is left stays, for want of a better: None.
        """
        if [other.counts for other in self.profile.usable()] == [choice.counts]:
            return None
        self.profile.mark_invalid(choice, reason)
        self.explorer.drop(choice)
        if self.choice is not None and self.choice.counts == choice.counts:
            self.choice = self._first() if self.exploring else None
            if not self.exploring:
                self._rebuild(now_s)
            return Change(self.choice, reason)
        return None

    def drop_larger(self, reason: str, now_s: float) -> Change | None:
        """Never again use as many threads as now; None where there is nothing smaller."""
        if self.choice is None:
            return None
        most, held = self.choice.threads, self.choice
        usable = self.profile.usable()
        if all(choice.threads >= most for choice in usable):
            return None
        for choice in usable:
            if choice.threads >= most and choice.counts != held.counts:
                self.drop(choice, reason, now_s)
        return self.drop(held, reason, now_s)

    def status(self) -> dict[str, Any]:
        """State in plain values."""
        label = self.choice.label(self.topology) if self.choice else "pause"
        return {
            "choice": label,
            "cores": list(self.choice.cores) if self.choice else [],
            "exploring": self.exploring,
            "frontier": [item.choice.label(self.topology) for item in self.frontier] + ["pause"],
            "moves": self.controller.moves,
            "steps": self.steps,
            "exploration_steps": self.exploration_steps,
            "loan_j": self.loan.loan_j,
            "celsius": self.heat.celsius if math.isfinite(self.heat.celsius) else None,
            "hold_s": self.controller.hold_s,
        }

    def _choices(self) -> list[Choice]:
        choices = enumerate_choices(self.topology, self.policy.choices)
        if self.policy.kind == "greedy":
            return [greedy_choice(self.topology, self.policy.choices)]
        if self.policy.kind == "fixed":
            wanted = [c for c in choices if c.threads == self.policy.fixed] or choices[-1:]
            return [max(wanted, key=lambda c: cost_of(c, self.topology))]
        return choices

    def _first(self) -> Choice:
        if self._to_verify:
            return self._to_verify[0][0]
        return self.explorer.current or self.profile.usable()[-1]

    def _explore(self, now_s: float, step: Step) -> Change | None:
        self.exploration_steps += 1
        if self._to_verify:
            self._verify(step)
        else:
            noisy = self.detector.demand.on(self.choice) if self.choice else 0.0
            disturbed = noisy > self.policy.interference.demand_share
            self.explorer.observe(step.seconds, step.joules, step.source, disturbed)
        if not self.exploring:
            self._rebuild(now_s)
            return Change(self.choice, "best of the measured choices")
        wanted = self._first()
        if self.choice is not None and wanted.counts == self.choice.counts:
            return None
        return self._switch(wanted, "measuring")

    def _guard_exploration(self, now_s: float, level: Level) -> Change | None:
        """The owner came back while we measure: stop measuring and go on with what is known."""
        if level == Level.NONE:
            return None
        known = any(self.profile.seen(choice) for choice in self.profile.usable())
        if self._to_verify or not known:
            return self._sidestep(level)
        self.explorer.current = None
        self._rebuild(now_s)
        change = self._decide(now_s, level)
        return change or Change(self.choice, "measuring was cut short by the owner")

    def _hold(self, now_s: float, step: Step) -> Change | None:
        assert self.choice is not None
        stats = self.profile.of(self.choice)
        known = len(stats.seconds) >= SELF_CALIBRATION_STEPS
        level = Level.NONE
        if known:
            level = self.detector.step(step.seconds, stats.median, step.clock)
        clean = level == Level.NONE and self.detector.quiet_on(self.choice) and step.clock > 0.95
        if clean:
            stats.add(step.seconds, step.joules, step.source)
            self._refresh(now_s)
        aside = self._sidestep(level)
        return aside or self._decide(now_s, level)

    def _refresh(self, now_s: float) -> None:
        """Put new measurements into the frontier without losing our place on it."""
        assert self.choice is not None
        frontier = self._frontier()
        place = self._place_of(frontier, self.choice)
        if place is None:
            return
        self.frontier = frontier
        self.controller.adopt(frontier, place, now_s)

    def _rebuild(self, now_s: float) -> None:
        self.frontier = self._frontier()
        place = self._best()
        self.controller.adopt(self.frontier, place, now_s)
        self._switch(self.frontier[place].choice, "")

    def _frontier(self) -> list[Estimate]:
        away = self.policy.energy and not self.battery.external
        return prune(self.profile.estimates(), by_energy=away)

    @staticmethod
    def _place_of(frontier: Sequence[Estimate], choice: Choice) -> int | None:
        places = [i for i, item in enumerate(frontier) if item.choice.counts == choice.counts]
        return places[0] if places else None

    def _best(self) -> int:
        known = [item for item in self.frontier if item.joules == item.joules]
        slowest = max(item.seconds for item in self.frontier)
        dearest = max((item.joules for item in known), default=0.0)
        price = self.loan.joule_price_s(slowest, dearest, self.battery)
        return best_index(self.frontier, price if self.policy.energy else 0.0)

    def _decide(self, now_s: float, level: Level) -> Change | None:
        place = self.controller.place
        above = self.frontier[place - 1 if place > 0 else place]
        situation = Situation(
            level=level,
            quiet_above=self.detector.quiet_on(self._placed(above.choice)),
            heat=self.heat.state,
            rising=self.heat.rising,
            refusal=self.loan.refusal(now_s, self.battery) if self.policy.energy else "",
            best=self._best(),
            step_s=self.frontier[place].seconds,
        )
        move = self.controller.decide(now_s, situation)
        if move is None:
            return None
        if move.target == PAUSE:
            self.choice = None
            self.detector.moved()
            return Change(None, move.reason)
        return self._switch(self.frontier[move.target].choice, move.reason)

    def _sidestep(self, level: Level) -> Change | None:
        """Trade our cores for quiet ones of the same clusters: gives way at no cost."""
        if level == Level.NONE or self.choice is None:
            return None
        placed = self._placed(self.choice)
        limit = self.policy.interference.demand_share / 2
        demand = self.detector.demand
        if set(placed.cores) == set(self.choice.cores) or demand.on(placed) > limit:
            return None
        return self._switch(self.choice, "the owner's core was swapped for a quiet one")

    def _switch(self, choice: Choice, reason: str) -> Change:
        self.choice = self._placed(choice)
        self.detector.moved()
        return Change(self.choice, reason)

    def _placed(self, choice: Choice) -> Choice:
        """The choice on those cores of its clusters that others use least, ours first on ties."""
        shares, ours = self.detector.demand.shares, set(self.choice.cores if self.choice else ())
        cores: list[int] = []
        for count, cluster in zip(choice.counts, self.topology.clusters):
            order = list(cluster.cores)
            rank = {core: place for place, core in enumerate(order)}
            order.sort(key=lambda c: (round(shares.get(c, 0.0), 1), c not in ours, rank[c]))
            cores += order[:count]
        return Choice(choice.counts, tuple(cores))

    def _cheapest(self) -> Choice:
        return self._placed(self.frontier[-1].choice if self.frontier else self.profile.choices[0])

    def _plan_verification(self, times: Mapping[tuple[int, ...], float], trusted: bool) -> None:
        known = [choice for choice in self.profile.choices if choice.counts in times]
        if not known:
            raise ConfigError("profile.choices", list(times), "choices that this device has")
        for choice in known:
            self.profile.of(choice).add(times[choice.counts], math.nan, "shared")
        if trusted:
            self.explorer.current = None
            return
        fastest = sorted(known, key=lambda choice: times[choice.counts])[:2]
        self._to_verify = [(choice, times[choice.counts]) for choice in fastest]

    def _verify(self, step: Step) -> None:
        self._verify_times.append(step.seconds)
        if len(self._verify_times) < VERIFY_STEPS:
            return
        choice, expected = self._to_verify.pop(0)
        # The first step after a move pays for cold caches, as the warm-up of the explorer does.
        times = sorted(self._verify_times[1:])
        self._verify_times = []
        median = times[len(times) // 2]
        good = abs(median / expected - 1) <= self.policy.verify_tolerance
        self.verified = good and self.verified is not False
        if not good:
            self._to_verify = []
            self.profile.stats.clear()
            self.explorer = Explorer(self.profile, self.policy.exploration)
            return
        stats = self.profile.of(choice)
        stats.seconds = times
        if not self._to_verify:
            self.explorer.current = None
