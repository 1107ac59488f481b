"""When to move along the frontier: downgrade at once, upgrade with patience.

A decision is a value; who carries it out, and how, is not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raysys.config import check, check_range
from raysys.federated.swan.frontier import Estimate
from raysys.federated.swan.heat import Heat
from raysys.federated.swan.interference import Level

PAUSE = -1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """Patience.

    Args:
        hold_s: quiet time before an upgrade; doubles after each upgrade that was undone within
            ``undone_s``, up to ``max_hold_s``; reset after ``forget_s`` without interference.
        min_dwell_s: least time between moves, severe downgrades aside.
        heat_s: time between downgrades while it is hot and not getting cooler.
        pause_after_s: interference in the cheapest choice for so long leads to a pause; 0 never.
    """

    hold_s: float = 10.0
    undone_s: float = 20.0
    max_hold_s: float = 600.0
    forget_s: float = 600.0
    min_dwell_s: float = 2.0
    heat_s: float = 5.0
    pause_after_s: float = 5.0

    def __post_init__(self) -> None:
        check_range(self, "hold_s", 0, low_open=True)
        check(self, "max_hold_s", self.max_hold_s >= self.hold_s, "at least hold_s")
        for name in ("undone_s", "forget_s", "min_dwell_s", "heat_s", "pause_after_s"):
            check_range(self, name, 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What is known at the moment of a decision.

    Args:
        level: interference now. quiet_above: nobody uses the cores of the next faster choice.
        heat: what the temperature allows. rising: the temperature is not falling.
        refusal: why training must wait, or empty.
        best: place on the frontier of the best choice under the energy price.
        step_s: expected time of a step, part of the least dwell.
    """

    level: Level = Level.NONE
    quiet_above: bool = True
    heat: Heat = Heat.COOL
    rising: bool = True
    refusal: str = ""
    best: int = 0
    step_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """From and to a place on the frontier (``PAUSE`` is after the last), and why."""

    origin: int
    target: int
    reason: str


class Controller:
    """Place on the frontier and the timers; starts at ``place`` of a frontier of ``size``."""

    def __init__(self, config: ControllerConfig | None = None) -> None:
        self.config = config or ControllerConfig()
        self.frontier: Sequence[Estimate] = ()
        self.place = 0
        self.moves = 0
        self._moved_s = float("-inf")
        self._upgraded_s = float("-inf")
        self._quiet_since = 0.0
        self._noisy_since: float | None = None
        self._heat_moved_s = float("-inf")
        self._last_noise_s = float("-inf")
        self._hold_s = self.config.hold_s

    @property
    def hold_s(self) -> float:
        """Quiet time that the next upgrade asks for."""
        return self._hold_s

    @property
    def paused(self) -> bool:
        return self.place == PAUSE

    def adopt(self, frontier: Sequence[Estimate], place: int, now_s: float) -> None:
        """Take over a (changed) frontier at a place of it."""
        self.frontier = frontier
        self.place = place
        self._quiet_since = max(self._quiet_since, now_s) if not self.moves else self._quiet_since

    def decide(self, now_s: float, situation: Situation) -> Move | None:
        """The move to make now, if any; call it at step ends and on signals.

        Raises nothing: a frontier of one element only ever pauses and resumes.
        """
        self._note(now_s, situation)
        forced = self._forced(now_s, situation)
        if forced is not None:
            return self._go(now_s, *forced)
        if situation.level != Level.NONE and not self.paused:
            return self._yield(now_s, situation)
        if self._may_upgrade(now_s, situation):
            target = self._above()
            self._upgraded_s = now_s
            return self._go(now_s, target, "quiet" if target >= situation.best else "energy price")
        return None

    def _note(self, now_s: float, situation: Situation) -> None:
        if situation.level != Level.NONE:
            self._quiet_since = now_s
            self._last_noise_s = now_s
            self._noisy_since = now_s if self._noisy_since is None else self._noisy_since
            return
        self._noisy_since = None
        if not situation.quiet_above:
            self._quiet_since = now_s
        if now_s - self._last_noise_s >= self.config.forget_s:
            self._hold_s = self.config.hold_s

    def _forced(self, now_s: float, situation: Situation) -> tuple[int, str] | None:
        """Moves that limits dictate: pause, cool down, get under the energy price."""
        if self.paused:
            return None
        if situation.refusal or situation.heat == Heat.CRITICAL:
            return PAUSE, situation.refusal or "too hot"
        if situation.heat == Heat.HOT:
            due = situation.rising and now_s - self._heat_moved_s >= self.config.heat_s
            if not due or self.place == len(self.frontier) - 1:
                return None
            self._heat_moved_s = now_s
            return self.place + 1, "hot"
        if self.place < situation.best and now_s - self._moved_s >= self._dwell(situation):
            return situation.best, "energy price"
        return None

    def _yield(self, now_s: float, situation: Situation) -> Move | None:
        severe = situation.level == Level.SEVERE
        if not severe and now_s - self._moved_s < self._dwell(situation):
            return None
        last = len(self.frontier) - 1
        if self.place == last:
            noisy = now_s - (self._noisy_since if self._noisy_since is not None else now_s)
            patience = self.config.pause_after_s
            if patience and noisy >= patience:
                return self._go(now_s, PAUSE, "the owner needs even the cheapest cores")
            return None
        if now_s - self._upgraded_s <= self.config.undone_s:
            self._hold_s = min(2 * self._hold_s, self.config.max_hold_s)
            self._upgraded_s = float("-inf")
        target = min(self.place + (2 if severe else 1), last)
        return self._go(now_s, target, "severe interference" if severe else "interference")

    def _may_upgrade(self, now_s: float, situation: Situation) -> bool:
        if situation.level != Level.NONE or not situation.quiet_above:
            return False
        limit = Heat.COOL if not self.paused else Heat.WARM
        if situation.heat > limit or situation.refusal:
            return False
        if not self.paused and self.place <= situation.best:
            return False
        waited = now_s - max(self._quiet_since, self._moved_s)
        return waited >= self._hold_s and now_s - self._moved_s >= self._dwell(situation)

    def _above(self) -> int:
        return len(self.frontier) - 1 if self.paused else self.place - 1

    def _dwell(self, situation: Situation) -> float:
        return max(self.config.min_dwell_s, situation.step_s)

    def _go(self, now_s: float, target: int, reason: str) -> Move:
        move = Move(self.place, target, reason)
        self.place = target
        self.moves += 1
        self._moved_s = now_s
        self._noisy_since = None
        return move
