"""Reach a wanted sparsity by moving eta during stage 1 (ours; the paper sweeps eta by hand)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from raysys.training.lte.config import require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """How eta follows the sparsity.

    Args:
        every: steps between changes.
        gain: exponent per unit of error, per change.
        damping: exponent per unit of the sparsity's own change since the last time; without it eta
            overshoots, because routers follow only after some steps.
        low, high: bounds of eta.
        freeze_from: share of stage 1 after which eta stays as it is.
        smoothing: share of the old value in the running sparsity.
    """

    every: int = 5
    gain: float = 4.0
    damping: float = 12.0
    low: float = 1e-5
    high: float = 100.0
    freeze_from: float = 0.9
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        require("every", self.every, self.every >= 1, "at least 1")
        require("gain", self.gain, self.gain > 0, "a number above 0")
        require("low", self.low, 0 < self.low <= self.high, "a number in (0, high]")
        require("freeze_from", self.freeze_from, 0 < self.freeze_from <= 1, "a share in (0, 1]")
        require("smoothing", self.smoothing, 0 <= self.smoothing < 1, "a share in [0, 1)")


class SparsityController:
    """``eta <- clip(eta * exp(gain * (wanted - s) - damping * change of s))`` every K steps."""

    def __init__(
        self, target: float, eta: float, steps: int, config: ControllerConfig | None = None
    ) -> None:
        require("target_sparsity", target, 0.0 <= target < 1.0, "a number in [0, 1)")
        self.config = config or ControllerConfig()
        self.target = target
        self.eta = min(max(eta, self.config.low), self.config.high)
        self.steps = steps
        self.sparsity: float | None = None
        self._last: float | None = None

    def observe(self, step: int, sparsity: float) -> float:
        """Take the hard sparsity of step ``step``; returns the eta of the next step."""
        old, keep = self.sparsity, self.config.smoothing
        self.sparsity = sparsity if old is None else keep * old + (1 - keep) * sparsity
        frozen = step >= self.config.freeze_from * self.steps
        if not frozen and (step + 1) % self.config.every == 0:
            change = 0.0 if self._last is None else self.sparsity - self._last
            self._last = self.sparsity
            push = self.config.gain * (self.target - self.sparsity) - self.config.damping * change
            self.eta = min(max(self.eta * math.exp(push), self.config.low), self.config.high)
        return self.eta

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"eta": self.eta, "sparsity": self.sparsity, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.eta, self.sparsity, self._last = state["eta"], state["sparsity"], state["last"]
