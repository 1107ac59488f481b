"""Do no harm: step down from pausing, and from reordering, when they stop paying.

Andes (arXiv 2404.16283) caps preemptions per request; with dear restores its literal form can still
end below first-come first-served. This controller watches what planning really costs and moves
between three modes with hysteresis: ``full -> admission_only -> fcfs`` and back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raysys.config import check, check_range
from raysys.serving.andes.snapshot import MODES, Mode


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """Options of the controller.

    Args:
        enabled: False keeps the mode at ``full``.
        time_constant_s: memory of the moving averages, in engine-busy seconds.
        max_waste: share of step time spent on restoring paused requests above which no more
            pauses are made.
        resume_waste: share below which pausing is allowed again.
        hold_s: least time in a mode before stepping up again.
        max_faults: planning failures (exceptions, unusable models) in a row before FCFS.
        max_plan_share: plan time over step time above which planning is given up for a while.
    """

    enabled: bool = True
    time_constant_s: float = 60.0
    max_waste: float = 0.10
    resume_waste: float = 0.03
    hold_s: float = 10.0
    max_faults: int = 3
    max_plan_share: float = 0.10

    def __post_init__(self) -> None:
        check_range(self, "time_constant_s", 0.0, low_open=True)
        check_range(self, "max_waste", 0.0, 1.0)
        check_range(self, "resume_waste", 0.0, 1.0)
        check_range(self, "hold_s", 0.0)
        check_range(self, "max_faults", 1)
        check_range(self, "max_plan_share", 0.0, low_open=True)
        check(self, "resume_waste", self.resume_waste <= self.max_waste, "at most max_waste")


class HarmController:
    """Chooses the planner's mode from realised costs."""

    def __init__(self, config: ControllerConfig | None = None) -> None:
        self.config = config or ControllerConfig()
        self.mode: Mode = "full"
        self.waste = 0.0
        self.plan_share = 0.0
        self.changes = 0
        self._faults = 0
        self._since_s = math.inf

    def on_step(self, seconds: float, restore_s: float) -> None:
        """Account one engine step, of which ``restore_s`` went into restoring paused requests."""
        if not self.config.enabled or not seconds > 0.0:
            return
        keep = math.exp(-seconds / self.config.time_constant_s)
        self.waste = keep * self.waste + (1.0 - keep) * min(1.0, restore_s / seconds)
        self.plan_share *= keep
        self._since_s += seconds
        self._update()

    def on_plan(self, seconds: float) -> None:
        """Account the time that a plan took; the share is per second of steps."""
        self._faults = 0
        self.plan_share += seconds / self.config.time_constant_s

    def on_fault(self) -> None:
        """A plan failed; the caller used FCFS for the step."""
        self._faults += 1
        if self.config.enabled:
            self._update()

    def _update(self) -> None:
        config = self.config
        if self._faults >= config.max_faults or self.plan_share > config.max_plan_share:
            self._faults = 0  # counted anew when planning is tried again
            self._move("fcfs")
        elif self.mode == "full" and self.waste > config.max_waste:
            self._move("admission_only")
        elif self._since_s >= config.hold_s:
            if self.mode == "fcfs" and self.plan_share < 0.5 * config.max_plan_share:
                self._move("admission_only")
            elif self.mode == "admission_only" and self.waste < config.resume_waste:
                self._move("full")

    def _move(self, mode: Mode) -> None:
        if mode not in MODES or mode == self.mode:
            return
        self.mode = mode
        self.changes += 1
        self._since_s = 0.0
