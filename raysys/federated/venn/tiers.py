"""Algorithm 2, tier matching: when to restrict a round to devices of one speed class.

Paper, section 4.3 and listing 2. A tier costs a ``V``-fold wait for devices and shrinks the
response time to ``g_u``; the head request of a group is restricted iff ``V + g_u c < 1 + c`` with
``c = T_resp / T_sched`` from its earlier rounds. Tiers are learned per job from the devices of its
earlier unrestricted rounds.

Where we differ: a tier is a run of *capability classes*, a fixed fine grid over the population's
expected task time, so that one plan serves jobs with different tier bounds; the last 2,048 response
times are kept instead of a digest; estimates from restricted rounds are scaled back (``/ V``,
``/ g_u``) before they enter the averages, or the rule would feed on its own effect; and the
deadline test takes the longer of ``D / |S|`` and the filling time that was observed, since under
contention a job gets only a part of ``S`` (the ideal time alone lets more rounds miss it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.venn.irs import IRS
from raysys.federated.venn.requests import ALL_CLASSES, GroupedPlan, OrderedPlan, Policy, Request
from raysys.federated.venn.supply import SupplyView

TAIL = 0.95
WEIGHT = 0.3
MIN_SAMPLES = 20
KEPT_SAMPLES = 2048


def should_restrict(tiers: int, gain: float, response_s: float, scheduling_s: float) -> bool:
    """The rule ``V + g c < 1 + c``; multiplied by T_sched, so that T_sched = 0 needs no infinity.

    With ``V = 1`` and with ``g = 1`` it always refuses.
    """
    if tiers <= 1 or not gain < 1:
        return False
    return tiers * scheduling_s + gain * response_s < scheduling_s + response_s


def meets_deadline(tiers: int, fill_s: float, response_s: float, deadline_s: float) -> bool:
    """``V * fill + T_resp < deadline``: the restricted round is expected in time."""
    return tiers * fill_s + response_s < deadline_s


@dataclass(slots=True)
class TierProfile:
    """What one job's finished rounds taught about its devices.

    Args:
        scheduling_s, response_s: weighted means over rounds of filling time and of the 95th
            percentile of the response; None before the first round.
    """

    scheduling_s: float | None = None
    response_s: float | None = None
    _classes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _responses: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def observe(
        self,
        fill_s: float,
        classes: npt.NDArray[np.int64],
        responses: npt.NDArray[np.float64],
        tiers: int,
        gain: float | None,
    ) -> None:
        """Learn from a finished round; ``gain`` is ``g_u`` if it was restricted, else None.

        Responses that are infinite (device lost) are left out, as the paper's tail is.
        """
        answered = np.isfinite(responses)
        if not answered.any():
            return
        tail_s = float(np.quantile(responses[answered], TAIL))
        if gain is not None:
            fill_s, tail_s = fill_s / tiers, tail_s / max(gain, 1e-6)
        else:
            self._classes = _latest(self._classes, classes[answered])
            self._responses = _latest(self._responses, responses[answered])
        self.scheduling_s = _blend(self.scheduling_s, fill_s)
        self.response_s = _blend(self.response_s, tail_s)

    def state(self) -> list[Any]:
        """The fields as plain values."""
        kinds, times = self._classes.tolist(), self._responses.tolist()
        return [self.scheduling_s, self.response_s, kinds, times]

    def bounds(self, tiers: int) -> list[int]:
        """First class of tiers 2..V: quantiles of the classes of earlier devices."""
        shares = np.arange(1, tiers) / tiers
        return [int(value) for value in np.ceil(np.quantile(self._classes, shares))]

    def tier(self, tier: int, tiers: int, classes: int) -> tuple[int, float] | None:
        """Bitset of classes and ``g`` of a tier (0 the fastest); None while too little is known."""
        if len(self._classes) < MIN_SAMPLES:
            return None
        edges = [0, *self.bounds(tiers), classes]
        low, high = edges[tier], edges[tier + 1]
        inside = (self._classes >= low) & (self._classes < high)
        if high <= low or np.count_nonzero(inside) < MIN_SAMPLES / tiers:
            return None
        whole_s = float(np.quantile(self._responses, TAIL))
        gain = float(np.quantile(self._responses[inside], TAIL)) / max(whole_s, 1e-9)
        return ((1 << high) - 1) ^ ((1 << low) - 1), gain


@dataclass(slots=True)
class TierMatcher:
    """Decides once per request, when it first becomes the head of its group.

    Args:
        tiers: ``V``; 1 switches matching off.
        classes: capability classes of the population's grid; at least ``tiers``.
        deadlines_s: deadline by job, where it has one.
    """

    tiers: int = 2
    classes: int = 12
    seed: int = 0
    deadlines_s: dict[int, float] = field(default_factory=dict)
    profiles: dict[int, TierProfile] = field(default_factory=dict)
    restricted: int = 0
    _decided: dict[int, tuple[int, int, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tiers < 1:
            raise ConfigError("tiers", self.tiers, "an integer >= 1")
        if self.classes < self.tiers:
            raise ConfigError("classes", self.classes, f"at least tiers ({self.tiers})")

    def decide(self, request: Request, rate: float) -> None:
        """Fix ``request.classes`` for the life of this request; ``rate`` is ``|S|`` per second."""
        decided = self._decided.get(request.job)
        if decided is not None and decided[0] == request.attempt:
            request.classes = decided[1]
            return
        classes, gain = ALL_CLASSES, None
        profile = self.profiles.get(request.job)
        if self.tiers > 1 and profile is not None and profile.scheduling_s is not None:
            draw = np.random.default_rng((self.seed, request.job, request.attempt))
            tier = profile.tier(int(draw.integers(self.tiers)), self.tiers, self.classes)
            response_s = profile.response_s or 0.0
            fill_s = max(request.demand / rate, profile.scheduling_s)
            deadline_s = self.deadlines_s.get(request.job, math.inf)
            if (
                tier is not None
                and should_restrict(self.tiers, tier[1], response_s, profile.scheduling_s)
                and meets_deadline(self.tiers, fill_s, response_s, deadline_s)
            ):
                classes, gain = tier
                self.restricted += 1
        request.classes = classes
        self._decided[request.job] = (request.attempt, classes, gain)

    def observe(
        self,
        request: Request,
        fill_s: float,
        classes: npt.NDArray[np.int64],
        responses: npt.NDArray[np.float64],
    ) -> None:
        """Learn from a finished round of ``request``."""
        decided = self._decided.get(request.job)
        gain = decided[2] if decided is not None and decided[0] == request.attempt else None
        profile = self.profiles.setdefault(request.job, TierProfile())
        profile.observe(fill_s, classes, responses, self.tiers, gain)
        if profile.response_s is not None:
            request.response_s = profile.response_s

    def forget(self, job: int) -> None:
        """Drop what is known about a job that left."""
        self.profiles.pop(job, None)
        self.deadlines_s.pop(job, None)
        self._decided.pop(job, None)

    def state_dict(self) -> dict[str, Any]:
        """What was learned and decided, as plain JSON-ready values."""
        return {
            "profiles": [[job, *profile.state()] for job, profile in self.profiles.items()],
            "deadlines_s": [[job, limit_s] for job, limit_s in self.deadlines_s.items()],
            "decided": [[job, *decided] for job, decided in self._decided.items()],
            "restricted": self.restricted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; an empty one clears everything."""
        self.profiles = {
            int(job): TierProfile(fill_s, tail_s, np.asarray(kinds, np.int64), np.asarray(times))
            for job, fill_s, tail_s, kinds, times in state.get("profiles", ())
        }
        self.deadlines_s = {int(job): float(value) for job, value in state.get("deadlines_s", ())}
        self._decided = {int(job): tuple(rest) for job, *rest in state.get("decided", ())}
        self.restricted = int(state.get("restricted", 0))


@dataclass(slots=True)
class TieredPolicy:
    """Any policy with tier matching for the head of every group (of the order, if ungrouped)."""

    inner: Policy
    matcher: TierMatcher

    @classmethod
    def of(
        cls,
        inner: Policy | None = None,
        tiers: int = 2,
        classes: int = 12,
        seed: int = 0,
        deadlines_s: Sequence[float] = (),
    ) -> TieredPolicy:
        """Tier matching on top of ``inner`` (default IRS)."""
        deadlines = dict(enumerate(deadlines_s))
        return cls(inner or IRS(), TierMatcher(tiers, classes, seed, deadlines))

    def plan(self, requests: Sequence[Request], supply: SupplyView, now_s: float) -> Any:
        """The inner policy's plan, with the heads' classes decided."""
        plan = self.inner.plan(requests, supply, now_s)
        for head in _heads(plan):
            self.matcher.decide(head, supply.group_rates[head.group])
        return plan

    def round_closed(
        self,
        request: Request,
        fill_s: float,
        classes: npt.NDArray[np.int64],
        responses: npt.NDArray[np.float64],
    ) -> None:
        """Called by the simulators and the service when a round succeeded."""
        self.matcher.observe(request, fill_s, classes, responses)


def _heads(plan: Any) -> Iterator[Request]:
    if isinstance(plan, GroupedPlan):
        yield from (order[0] for order in plan.order.values())
    elif isinstance(plan, OrderedPlan):
        yield from _first_of_groups(plan.order)


def _first_of_groups(order: Iterable[Request]) -> Iterator[Request]:
    seen: set[int] = set()
    for request in order:
        if request.group not in seen:
            seen.add(request.group)
            yield request


def _latest(kept: npt.NDArray[Any], new: npt.NDArray[Any]) -> npt.NDArray[Any]:
    latest: npt.NDArray[Any] = np.concatenate([kept, new])[-KEPT_SAMPLES:]
    return latest


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
