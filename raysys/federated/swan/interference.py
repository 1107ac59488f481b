"""Has the owner come back? Two independent signals.

Own slowdown is the paper's: observed against expected step time. Others' demand for our cores
fires before a step has finished, so that long steps do not delay the reaction.
"""

from __future__ import annotations

import dataclasses
import enum
import statistics
from collections.abc import Mapping

from raysys.config import check_range
from raysys.federated.swan.choices import Choice

NOISE_PER_CORE = 0.03


class Level(enum.IntEnum):
    """How badly the owner and we are in each other's way."""

    NONE = 0
    MILD = 1
    SEVERE = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InterferenceConfig:
    """Thresholds.

    Args:
        delta: mild slowdown of the median of ``window`` steps. severe: of a single step.
        demand_share: share of one of our cores that other processes use, ...
        demand_s: ... for so long.
        pressure: ``some`` share of time in which tasks waited for a CPU; counts only together
            with half of ``demand_share``, because our own threads wait for each other as well.
    """

    delta: float = 0.25
    severe: float = 2.5
    window: int = 3
    demand_share: float = 0.3
    demand_s: float = 0.5
    pressure: float = 0.10

    def __post_init__(self) -> None:
        check_range(self, "delta", 0, low_open=True)
        check_range(self, "severe", 1 + self.delta, low_open=True)
        check_range(self, "window", 1)
        check_range(self, "demand_share", 0, 1, low_open=True)
        check_range(self, "demand_s", 0)
        check_range(self, "pressure", 0, 1, low_open=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Others' use of the processor over the last sample.

    Args:
        shares: per core, share of its time that processes other than ours took.
        pressure: share of the time in which some task waited for a CPU.
        owner_active: the screen is on, or the system says that the owner is there.
    """

    shares: Mapping[int, float] = dataclasses.field(default_factory=dict)
    pressure: float = 0.0
    owner_active: bool = False

    def on(self, choice: Choice) -> float:
        """Cores' worth of others' work on a choice: on its busiest core, or over all of them.

        A process that hops between our cores shows on none of them; a little on each is the
        system's ordinary noise.
        """
        taken = [self.shares.get(core, 0.0) for core in choice.cores]
        return max(max(taken, default=0.0), sum(taken) - NOISE_PER_CORE * len(taken))


class Detector:
    """Remembers recent steps and samples of the choice in use; a move resets the steps."""

    def __init__(self, config: InterferenceConfig | None = None) -> None:
        self.config = config or InterferenceConfig()
        self.demand = Demand()
        self._ratios: list[float] = []
        self._busy_since: float | None = None

    def moved(self) -> None:
        """Forget what belonged to the previous choice."""
        self._ratios = []
        self._busy_since = None

    def step(self, seconds: float, expected_s: float, clock: float = 1.0) -> Level:
        """Judge a finished step.

        Args:
            expected_s: median of the profile. clock: current over expected frequency, so that
                heat is not mistaken for the owner.
        """
        ratio = seconds * min(max(clock, 0.05), 1.0) / expected_s
        self._ratios = [*self._ratios[1 - self.config.window :], ratio]
        if ratio > self.config.severe:
            return Level.SEVERE
        full = len(self._ratios) == self.config.window
        slow = full and statistics.median(self._ratios) > 1 + self.config.delta
        return Level.MILD if slow else Level.NONE

    def sample(self, now_s: float, demand: Demand, choice: Choice) -> Level:
        """Judge a sample of others' demand on the cores in use."""
        self.demand = demand
        share = demand.on(choice)
        waits = demand.pressure > self.config.pressure and share > self.config.demand_share / 2
        if not (share > self.config.demand_share or waits or demand.owner_active):
            self._busy_since = None
            return Level.NONE
        if self._busy_since is None:
            self._busy_since = now_s
        lasted = now_s - self._busy_since >= self.config.demand_s
        return Level.MILD if lasted else Level.NONE

    def quiet_on(self, choice: Choice) -> bool:
        """Whether nobody uses the cores of a choice that we might move to."""
        return not self.demand.owner_active and (
            self.demand.on(choice) <= self.config.demand_share / 2
        )
