"""When a module has stopped changing: smoothing, slope, threshold (paper, algorithm 1).

    smoothed_i = mean of the last min(W, i) readings
    slope_i    = least-squares slope of the last min(W, i) smoothed values
    threshold  = coef * max |slope| over the first three slopes, set once
    stale      = stale + 1 if |slope| < threshold else 0;  converged when stale >= W

The published pseudo-code compares the signed slope, so that any falling curve would freeze; its
text ("0 means no change") asks for the absolute value, which we take. We also act at once rather
than at the following check, and give a curve of identical readings a floor so that it can freeze.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_EARLY_SLOPES = 3
_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """One evaluated plasticity and what the criterion made of it; NaN-free, JSON-ready."""

    module: int
    plasticity: float
    smoothed: float
    slope: float | None
    threshold: float | None
    stale: int
    converged: bool


def slope_of(values: list[float]) -> float:
    """Least-squares slope over x = 0, 1, 2, ...; at least two values."""
    count = len(values)
    centre = (count - 1) / 2
    mean = sum(values) / count
    above = sum((index - centre) * (value - mean) for index, value in enumerate(values))
    return above / sum((index - centre) ** 2 for index in range(count))


class ModuleTrack:
    """Readings of one module; :meth:`add` applies the criterion.

    Args:
        window: W, at least 2.
        coef: factor of the threshold.
        threshold: a threshold kept from an earlier phase of the module, or None to set it from
            the first three slopes.
    """

    def __init__(
        self, module: int, window: int, coef: float, threshold: float | None = None
    ) -> None:
        self.module = module
        self.window = window
        self.coef = coef
        self.threshold = threshold
        self.readings: list[float] = []
        self.smoothed: list[float] = []
        self.early: list[float] = []
        self.first_smoothed: float | None = None
        self.stale = 0

    def add(self, plasticity: float) -> Reading:
        """Take one finite reading and say whether the module has converged."""
        self.readings = [*self.readings, plasticity][-self.window :]
        mean = sum(self.readings) / len(self.readings)
        self.smoothed = [*self.smoothed, mean][-self.window :]
        slope = slope_of(self.smoothed) if len(self.smoothed) >= 2 else None
        if slope is not None:
            self._judge(slope, mean)
        return Reading(
            self.module, plasticity, mean, slope, self.threshold, self.stale, self.converged
        )

    @property
    def converged(self) -> bool:
        """Whether the slope has been flat for a whole window."""
        return self.stale >= self.window

    def _judge(self, slope: float, mean: float) -> None:
        if self.threshold is None:
            self.early.append(abs(slope))
            if len(self.early) < _EARLY_SLOPES:
                return
            self.first_smoothed = mean
            self.threshold = max(self.coef * max(self.early), _FLOOR * mean * self._flat())
            if self.threshold == 0.0:
                # All readings are exactly zero: the module is dead, any slope counts as flat.
                self.threshold = 1e-30
        self.stale = self.stale + 1 if abs(slope) < self.threshold else 0

    def _flat(self) -> float:
        """1 where the early slopes are all zero (the floor applies), else 0."""
        return 1.0 if max(self.early) == 0.0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, JSON-ready."""
        return {
            name: list(value) if isinstance(value, list) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ModuleTrack:
        """Rebuild a track from :meth:`state_dict`."""
        track = cls(state["module"], state["window"], state["coef"])
        for name, value in state.items():
            setattr(track, name, list(value) if isinstance(value, list) else value)
        return track
