"""What freezing saves: predicted from the measured cost of every module.

A frozen module needs no backward pass; with the activation cache its forward becomes a read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raysys.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModuleCost:
    """Measured CPU seconds of one module for one batch."""

    forward_s: float
    backward_s: float

    @property
    def step_s(self) -> float:
        """Forward and backward together."""
        return self.forward_s + self.backward_s


@dataclasses.dataclass(frozen=True, slots=True)
class Savings:
    """Predicted step times.

    Args:
        costs: one per module, in order.
        cached: whether the frozen prefix is read instead of computed.
        read_s: seconds to read one batch from the cache.
    """

    costs: Sequence[ModuleCost]
    cached: bool = False
    read_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.costs:
            raise ConfigError("costs", self.costs, "at least one module")

    def step_s(self, upto: int) -> float:
        """Predicted seconds of a step with modules ``0 .. upto - 1`` frozen."""
        forward = sum(cost.forward_s for cost in self.costs[:upto])
        prefix = min(forward, self.read_s) if self.cached and upto else forward
        return prefix + sum(cost.step_s for cost in self.costs[upto:])

    def share(self, now: int, upto: int, remaining: float) -> float:
        """Share of the remaining run that going from ``now`` to ``upto`` frozen modules saves.

        Args:
            remaining: share of the run that is left; 0 saves nothing.
        """
        whole = self.step_s(0)
        if whole <= 0 or remaining <= 0:
            return 0.0
        return (self.step_s(now) - self.step_s(upto)) / whole

    def speedup(self, upto: int) -> float:
        """Predicted full step time over the frozen one."""
        frozen = self.step_s(upto)
        return self.step_s(0) / frozen if frozen > 0 else float("inf")
