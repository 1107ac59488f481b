"""Other ways to decide what is frozen, on the same machinery, for honest comparison.

Each is a controller: it sees the same steps and shares freezer, cache and runner with the
knowledge-guided one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from raysys.config import check_range
from raysys.errors import ConfigError
from raysys.training.kgt.decision import QuietControl


class NoFreezing(QuietControl):
    """Vanilla training."""


class StaticFreezing(QuietControl):
    """Modules ``0 .. upto - 1`` are frozen from one step on, as in transfer learning."""

    def __init__(self, step: int, upto: int) -> None:
        super().__init__()
        self.step = step
        self.upto = upto

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """Freeze when the time has come."""
        if step + 1 >= self.step:
            self.decide(self.upto, step + 1, "static")


class LinearSchedule(QuietControl):
    """A linearly growing share of the modules, as MosaicML Composer's ``LayerFreezing``.

    At the end of every epoch: share = level * (progress - start) / (1 - start), and that share of
    the modules, rounded down, is frozen. Composer counts leaf layers; we count layer modules, which
    are what can be skipped.

    Args:
        start: share of the run before the first freeze, in [0, 1).
        level: share of the modules frozen at the end, in (0, 1].
        modules: number of layer modules; the head never freezes.
    """

    def __init__(self, start: float, level: float, modules: int, total_steps: int) -> None:
        super().__init__()
        self.start = start
        self.level = level
        check_range(self, "start", 0, 1, high_open=True)
        check_range(self, "level", 0, 1, low_open=True)
        self.modules = modules
        self.total_steps = total_steps
        self.last_epoch = 0

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """Freeze the share that belongs to the finished epochs."""
        if epoch == self.last_epoch:
            return
        self.last_epoch = epoch
        progress = (step + 1) / self.total_steps
        share = max(0.0, (progress - self.start) / (1 - self.start)) * self.level
        self.decide(min(int(share * self.modules), self.modules - 1), step + 1, "linear schedule")

    def state_dict(self) -> dict[str, Any]:
        """Decision and the last epoch seen."""
        return {**super().state_dict(), "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        super().load_state_dict(state)
        self.last_epoch = state["last_epoch"]


class GradientCriterion(QuietControl):
    """AutoFreeze (Liu et al., 2021): freeze where gradient norms have stopped changing.

    Over each interval the L1 norm of every module's gradients is accumulated. Change is
    ``|before - now| / before``. All active modules before the first whose change reaches the
    percentile of the active ones are frozen; nothing is ever released.

    Args:
        interval: optimizer steps per interval.
        percentile: 50 in the publication.
    """

    needs_gradients = True

    def __init__(self, interval: int, modules: int, percentile: float = 50.0) -> None:
        super().__init__()
        if interval < 1:
            raise ConfigError("interval", interval, "at least 1")
        self.interval = interval
        self.percentile = percentile
        check_range(self, "percentile", 0, 100)
        self.modules = modules
        self.sums = [0.0] * modules
        self.before: list[float] | None = None

    def gradients(self, step: int, modules: list[list[nn.Parameter]]) -> None:
        """Accumulate, and judge at the end of an interval."""
        for index in range(self.decision.frozen_upto, self.modules):
            for parameter in modules[index]:
                if parameter.grad is not None:
                    self.sums[index] += float(parameter.grad.abs().sum())
        if (step + 1) % self.interval:
            return
        if self.before is not None:
            self._judge(step, self.before)
        self.before, self.sums = self.sums, [0.0] * self.modules

    def _judge(self, step: int, before: Sequence[float]) -> None:
        active = range(self.decision.frozen_upto, self.modules)
        change = [abs(before[i] - self.sums[i]) / before[i] if before[i] else 0.0 for i in active]
        limit = _percentile(change, self.percentile)
        still = next((offset for offset, value in enumerate(change) if value >= limit), 0)
        upto = min(self.decision.frozen_upto + still, self.modules - 1)
        self.decide(upto, step + 1, "gradient norms settled")

    def state_dict(self) -> dict[str, Any]:
        """Decision and accumulated norms."""
        before = None if self.before is None else list(self.before)
        return {**super().state_dict(), "sums": list(self.sums), "before": before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        super().load_state_dict(state)
        self.sums = list(state["sums"])
        self.before = None if state["before"] is None else list(state["before"])


class Replay(QuietControl):
    """Repeats recorded decisions: KGT's schedule without its overhead, or any other.

    Args:
        schedule: (step, upto) pairs in ascending steps.
    """

    def __init__(self, schedule: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        steps = [step for step, _ in schedule]
        if steps != sorted(steps):
            raise ConfigError("schedule", schedule, "ascending steps")
        self.schedule = list(schedule)

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """Apply what is due."""
        due = [upto for at, upto in self.schedule if at <= step + 1]
        if due:
            self.decide(due[-1], step + 1, "replay")


def schedule_of(events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The (step, upto) pairs of an event log, for :class:`Replay`."""
    return [(event["step"], event["upto"]) for event in events if event["event"] == "applied"]


def _percentile(values: Sequence[float], percentile: float) -> float:
    """Linear interpolation between order statistics."""
    if len(values) == 1:
        return values[0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    place = round(percentile)
    return min(values) if place <= 0 else max(values) if place >= 100 else cuts[place - 1]
