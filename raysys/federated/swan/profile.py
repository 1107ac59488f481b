"""The in-situ profile: what was measured of each choice, and estimates for those that were not.

Every measured step is a real step of the task. Choices that have not run yet
are estimated from those that have: cores of one kind at their relative speed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raysys.errors import ConfigError
from raysys.federated.swan.choices import Choice, ChoiceConfig, cost_of, slowest_speed
from raysys.federated.swan.frontier import Estimate
from raysys.federated.swan.topology import Topology

SCHEMA = 1
KEPT_STEPS = 64
Z90 = 1.645
MEDIAN_FACTOR = 1.2533  # standard error of a median over that of a mean, for normal noise


@dataclasses.dataclass(slots=True)
class ChoiceStats:
    """Steps seen on one choice; the newest ``KEPT_STEPS`` count."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    joules: list[float] = dataclasses.field(default_factory=list)
    source: str = "none"
    invalid: str = ""

    def add(self, seconds: float, joules: float, source: str) -> None:
        """Record one undisturbed step; joules may be NaN.

        Raises:
            ConfigError: a step time that is not a positive finite number.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError("step seconds", seconds, "a positive finite number")
        self.seconds = [*self.seconds[1 - KEPT_STEPS :], seconds]
        if math.isfinite(joules):
            self.joules = [*self.joules[1 - KEPT_STEPS :], joules]
            self.source = source

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]

    def half_width(self) -> float:
        """Relative half-width of the 90 % interval of the median; infinite below 3 steps."""
        if len(self.seconds) < 3:
            return math.inf
        spread = statistics.stdev(self.seconds)
        return Z90 * MEDIAN_FACTOR * spread / math.sqrt(len(self.seconds)) / self.median


@dataclasses.dataclass(slots=True)
class StepProfile:
    """Measured choices of one task on one device."""

    topology: Topology
    choices: Sequence[Choice]
    config: ChoiceConfig
    stats: dict[tuple[int, ...], ChoiceStats] = dataclasses.field(default_factory=dict)

    def of(self, choice: Choice) -> ChoiceStats:
        """Statistics of a choice, empty when it has not run."""
        return self.stats.setdefault(choice.counts, ChoiceStats())

    def seen(self, choice: Choice) -> bool:
        found = self.stats.get(choice.counts)
        return found is not None and bool(found.seconds)

    def typical(self, choice: Choice) -> tuple[float, float]:
        """Median seconds and joules of a step on a choice; NaN where there are none."""
        found = self.stats.get(choice.counts)
        if found is None or not found.seconds:
            return math.nan, math.nan
        return found.median, statistics.median(found.joules) if found.joules else math.nan

    def mark_invalid(self, choice: Choice, reason: str) -> None:
        """Never use a choice again (unenforceable, out of memory, cores gone)."""
        self.of(choice).invalid = reason

    def usable(self) -> list[Choice]:
        """Choices that are not marked; the cheapest always stays."""
        kept = [c for c in self.choices if not (c.counts in self.stats and self.of(c).invalid)]
        return kept or [self.choices[0]]

    def estimates(self) -> list[Estimate]:
        """One estimate per usable choice, measured where there are steps.

        Raises:
            ConfigError: nothing was measured yet.
        """
        measured = [choice for choice in self.usable() if self.seen(choice)]
        if not measured:
            raise ConfigError("profile", "empty", "at least one measured step")
        return [self._estimate(choice, measured) for choice in self.usable()]

    def _estimate(self, choice: Choice, measured: Sequence[Choice]) -> Estimate:
        cost = cost_of(choice, self.topology, self.config)
        if self.seen(choice):
            stats = self.of(choice)
            joules = statistics.median(stats.joules) if stats.joules else math.nan
            return Estimate(
                choice=choice,
                cost=cost,
                seconds=stats.median,
                seconds_p95=stats.p95,
                joules=joules,
                source=stats.source,
                steps=len(stats.seconds),
            )
        seconds = self._predict(choice, measured)
        return Estimate(choice=choice, cost=cost, seconds=seconds, seconds_p95=seconds)

    def _predict(self, choice: Choice, measured: Sequence[Choice]) -> float:
        """Scale by speed from the same number of threads, interpolated between measured ones.

        The time at full speed is taken to be log-linear in the logarithm of the threads; beyond
        the measured range the last value holds. That is enough to say on which side of the
        frontier a choice lies; the first steps on it replace the guess.
        """
        by_threads: dict[int, list[float]] = {}
        for other in measured:
            work = self.of(other).median * slowest_speed(other, self.topology)
            by_threads.setdefault(other.threads, []).append(work)
        points = sorted((math.log(n), math.log(min(found))) for n, found in by_threads.items())
        at = math.log(choice.threads)
        return math.exp(_interpolate(points, at)) / slowest_speed(choice, self.topology)

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready content for sharing and for the disk."""
        return {
            "schema": SCHEMA,
            "device": self.topology.device,
            "choices": [
                {
                    "counts": list(counts),
                    "seconds": stats.median,
                    "joules": statistics.median(stats.joules) if stats.joules else None,
                    "source": stats.source,
                    "steps": len(stats.seconds),
                }
                for counts, stats in sorted(self.stats.items())
                if stats.seconds and not stats.invalid
            ],
        }


def check_plain(plain: Mapping[str, Any], device: str = "") -> dict[tuple[int, ...], float]:
    """Check a profile that came from outside; step seconds by counts.

    Raises:
        ConfigError: another schema or device, or times that are not positive and finite.
    """
    if plain.get("schema") != SCHEMA:
        raise ConfigError("profile.schema", plain.get("schema"), str(SCHEMA), "Measure again")
    if device and plain.get("device") != device:
        raise ConfigError("profile.device", plain.get("device"), device, "Another processor's")
    rows = plain.get("choices")
    if not isinstance(rows, list) or not 1 <= len(rows) <= 4096:
        raise ConfigError("profile.choices", type(rows).__name__, "a list of 1 to 4096 choices")
    found: dict[tuple[int, ...], float] = {}
    for row in rows:
        counts, seconds = _row(row)
        found[counts] = seconds
    return found


def _row(row: Any) -> tuple[tuple[int, ...], float]:
    if not isinstance(row, Mapping):
        raise ConfigError("profile.choices", row, "objects with counts and seconds")
    counts: Any = row.get("counts")
    seconds: Any = row.get("seconds")
    good = (
        isinstance(counts, list)
        and 1 <= len(counts) <= 16
        and all(isinstance(n, int) and 0 <= n <= 4096 for n in counts)
    )
    if not good:
        raise ConfigError("profile.counts", counts, "a list of whole numbers")
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not math.isfinite(seconds) or not 0 < seconds < 86_400:
        raise ConfigError("profile.seconds", seconds, "a positive time below a day")
    return tuple(counts), float(seconds)


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return points[-1][1]
