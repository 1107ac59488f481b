"""Which choice to measure next: a race over thread counts, then over the leaders.

The paper measures every choice while the device is idle. Here a choice is measured only as long as
it may still be the best one: fast cores first, one thread, two, four, ...; a doubling that makes
the step slower ends the climb; then the neighbours of the best; then more steps for the leaders
until the interval is narrow. Slow cores are measured when they are first used. ``full`` measures
every choice to that accuracy, for a device that is idle anyway.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from raysys.config import check_range
from raysys.federated.swan.choices import Choice, slowest_speed
from raysys.federated.swan.profile import StepProfile

MOST_DISTURBED = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExplorationConfig:
    """How much to measure.

    Args:
        full: every choice, all-fast first, each to the end.
        first_warmup, warmup: steps that do not count after the first and after each later move.
        scout_steps: steps of the first look at a choice.
        min_steps, min_s: a finished choice has at least so many steps, over so much time ...
        half_width: ... and a 90 % interval of its median no wider than this share of it ...
        max_s: ... or has run for so long.
        give_up: a step this many times slower than the best median ends the look at once.
        rivals: medians within this share of the best are measured to the end as well.
    """

    full: bool = False
    first_warmup: int = 2
    warmup: int = 1
    scout_steps: int = 2
    min_steps: int = 5
    min_s: float = 0.5
    half_width: float = 0.05
    max_s: float = 30.0
    give_up: float = 1.5
    rivals: float = 0.12

    def __post_init__(self) -> None:
        for name in ("first_warmup", "warmup"):
            check_range(self, name, 0)
        check_range(self, "scout_steps", 1)
        check_range(self, "min_steps", self.scout_steps)
        check_range(self, "min_s", 0)
        check_range(self, "half_width", 0, low_open=True)
        check_range(self, "max_s", self.min_s)
        check_range(self, "give_up", 1, low_open=True)
        check_range(self, "rivals", 0)


class Explorer:
    """Drives a profile to the point where the best choice is known.

    Args:
        profile: filled by :meth:`observe`; may hold measurements already, which are kept.
    """

    def __init__(self, profile: StepProfile, config: ExplorationConfig | None = None) -> None:
        self.profile = profile
        self.config = config or ExplorationConfig()
        self.steps = 0
        self.current: Choice | None = None
        self._left_warmup = 0
        self._disturbed = 0
        self._closed: set[tuple[int, ...]] = set()
        self._abandoned: set[tuple[int, ...]] = set()
        self._next()

    @property
    def done(self) -> bool:
        """Whether the best choice is known."""
        return self.current is None

    def observe(self, seconds: float, joules: float, source: str, disturbed: bool = False) -> None:
        """Take one step of :attr:`current`; a disturbed one is not recorded.

        Raises:
            ConfigError: the step time is not a positive finite number.
        """
        choice = self.current
        if choice is None:
            return
        self.steps += 1
        too_slow = not self.config.full and self._hopeless(seconds)
        if self._left_warmup and not too_slow:
            self._left_warmup -= 1
            return
        # On a device that is never quiet a disturbed measurement is better than none for ever.
        self._disturbed = self._disturbed + 1 if disturbed else 0
        if 0 < self._disturbed <= MOST_DISTURBED:
            return
        self.profile.of(choice).add(seconds, joules, source)
        if too_slow:
            self._abandoned.add(choice.counts)
        self._next()

    def drop(self, choice: Choice) -> None:
        """The choice turned out to be unusable (see :meth:`StepProfile.mark_invalid`)."""
        self._closed.add(choice.counts)
        self._next()

    def _next(self) -> None:
        wanted = self._pick()
        if wanted is not None and wanted != self.current:
            first = self.current is None and not self.profile.stats
            self._left_warmup = self.config.first_warmup if first else self.config.warmup
        self.current = wanted

    def _pick(self) -> Choice | None:
        if self.config.full:
            return self._pick_full()
        climb = self._pick_climb()
        return climb if climb is not None else self._pick_leader()

    def _pick_full(self) -> Choice | None:
        order = sorted(
            self.profile.usable(),
            key=lambda c: (-(slowest_speed(c, self.profile.topology) >= 0.7), -c.threads),
        )
        return next((c for c in order if not self._finished(c)), None)

    def _pick_climb(self) -> Choice | None:
        """First look: one thread, two, four, ... on fast cores, then halves around the best."""
        ladder = self._representatives()
        if self.current is not None and not self._scouted(self.current):
            return self.current
        climbing = _doublings(sorted(ladder))
        for lower, size in zip([0, *climbing], climbing):
            if self._scouted(ladder[size]):
                worse = lower and self._time(ladder[size]) > self._time(ladder[lower])
                if worse:
                    break
                continue
            return ladder[size]
        known = [size for size in sorted(ladder) if self._scouted(ladder[size])]
        best = min(known, key=lambda size: self._time(ladder[size]))
        place = known.index(best)
        for low, high in zip(known[max(place - 1, 0) : place + 1], known[place : place + 2]):
            between = [size for size in sorted(ladder) if low < size < high]
            if between and not self._dominated(ladder, known, between):
                return ladder[between[len(between) // 2]]
        return None

    def _dominated(self, ladder: dict[int, Choice], known: list[int], between: list[int]) -> bool:
        """Whether a size between two measured ones cannot win: going from 1 to 2 only hurt."""
        return known[0] == 1 and between[0] > 2 and self._grows(ladder, known)

    def _grows(self, ladder: dict[int, Choice], known: list[int]) -> bool:
        times = [self._time(ladder[size]) for size in known]
        return all(later > 1.1 * earlier for earlier, later in itertools.pairwise(times))

    def _pick_leader(self) -> Choice | None:
        """More steps for the best and for those that it has not clearly beaten."""
        seen = [c for c in self.profile.usable() if self._scouted(c)]
        if not seen:
            return None
        best = min(self._time(c) for c in seen)
        leaders = [c for c in seen if self._time(c) <= (1 + self.config.rivals) * best]
        return next((c for c in leaders if not self._finished(c)), None)

    def _representatives(self) -> dict[int, Choice]:
        """Per number of threads the choice to measure: the fastest slowest core, then cheapest.

        Choices of a size whose slowest cores are equal take the same time, so the cheapest of
        them stands for all. Little cores take part only where there is nothing else.
        """
        topology = self.profile.topology
        usable = [c for c in self.profile.usable() if c.counts not in self._closed]
        fast = [c for c in usable if slowest_speed(c, topology) >= _fast_from(self.profile)]
        found: dict[int, Choice] = {}
        for choice in fast or usable:
            held = found.get(choice.threads)
            if held is None or slowest_speed(choice, topology) > slowest_speed(held, topology):
                found[choice.threads] = choice
        return found

    def _scouted(self, choice: Choice) -> bool:
        if choice.counts in self._abandoned or choice.counts in self._closed:
            return True
        found = self.profile.stats.get(choice.counts)
        return found is not None and len(found.seconds) >= self.config.scout_steps

    def _finished(self, choice: Choice) -> bool:
        if choice.counts in self._abandoned or choice.counts in self._closed:
            return True
        found = self.profile.stats.get(choice.counts)
        if found is None:
            return False
        spent, config = sum(found.seconds), self.config
        if spent >= config.max_s:
            return True
        enough = len(found.seconds) >= config.min_steps and spent >= config.min_s
        return enough and found.half_width() < config.half_width

    def _time(self, choice: Choice) -> float:
        found = self.profile.stats.get(choice.counts)
        return found.median if found is not None and found.seconds else math.inf

    def _hopeless(self, seconds: float) -> bool:
        times = [stats.median for stats in self.profile.stats.values() if stats.seconds]
        return bool(times) and seconds > self.config.give_up * min(times)


def _doublings(sizes: list[int]) -> list[int]:
    climbing = [sizes[0]]
    for size in sizes:
        if size >= 2 * climbing[-1] or (size == sizes[-1] and size > climbing[-1]):
            climbing.append(size)
    return climbing


def _fast_from(profile: StepProfile) -> float:
    clusters = profile.topology.clusters
    return min((c.speed for c in clusters if c.kind != "little"), default=0.0)
