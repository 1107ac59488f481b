"""Controllers of the budget: a ramp at the start, a guard that finds the smallest budget itself.

Both are pure: they are told what happened and answer with a number of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysys.config import check, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class Ramp:
    """Cubic ramp of the pruning ratio: rho(s) = end * (1 - (1 - s / steps)^3), from 0.

    Args:
        end: pruning ratio at the end. steps: its length. full_slots: chunks of the unpruned tables.
    """

    end: float
    steps: int
    full_slots: int

    def __post_init__(self) -> None:
        check_range(self, "end", 0, 1, high_open=True)
        check_range(self, "steps", 1)
        check_range(self, "full_slots", 1)

    def ratio(self, step: int) -> float:
        """Pruning ratio at a step."""
        left = max(0.0, 1 - step / self.steps)
        return self.end * (1 - left**3)

    def slots(self, step: int) -> int:
        """Chunks allowed at a step."""
        return max(1, round(self.full_slots * (1 - self.ratio(step))))


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """The quality guard.

    A slice of traffic is scored twice, once with the chunks just above the threshold hidden. If
    that costs more than ``tol`` of log-loss the budget is too tight; if it costs less than a
    quarter of ``tol`` for ``patience`` checks, it is too wide.

    Args:
        tol: tolerated rise of log-loss in nats.
        step: relative change of the budget per decision.
        patience: calm checks before the budget shrinks.
        cap_slots, floor_slots: bounds of the budget in chunks.
    """

    tol: float = 0.0005
    step: float = 0.05
    patience: int = 5
    cap_slots: int
    floor_slots: int = 1

    def __post_init__(self) -> None:
        check_range(self, "tol", 0, low_open=True)
        check_range(self, "step", 0, 0.5, low_open=True)
        check_range(self, "patience", 1)
        check_range(self, "floor_slots", 1)
        wide = self.cap_slots >= self.floor_slots
        check(self, "cap_slots", wide, "at least floor_slots")


@dataclass(frozen=True, slots=True)
class Decision:
    """What one check led to: "raise", "lower", "hold", and the budget after it."""

    action: str
    slots: int
    loss: float
    masked_loss: float


class Guard:
    """Closed loop of the budget; :meth:`check` after every double scoring."""

    def __init__(self, config: GuardConfig, slots: int) -> None:
        self.config = config
        self.slots = min(max(slots, config.floor_slots), config.cap_slots)
        self.calm = 0
        self.decisions: list[Decision] = []

    def check(self, loss: float, masked_loss: float) -> Decision:
        """Log-loss of the slice with all chunks and with the marginal ones hidden."""
        rise = masked_loss - loss
        old = self.slots
        if rise > self.config.tol:
            self.calm = 0
            self.slots = min(self.config.cap_slots, round(old * (1 + self.config.step)) or 1)
        elif rise < self.config.tol / 4:
            self.calm += 1
            if self.calm >= self.config.patience:
                self.calm = 0
                lower = round(old * (1 - self.config.step))
                self.slots = max(self.config.floor_slots, lower)
        else:
            self.calm = 0
        action = "raise" if self.slots > old else "lower" if self.slots < old else "hold"
        decision = Decision(action, self.slots, loss, masked_loss)
        self.decisions.append(decision)
        return decision


class DriftDetector:
    """Page-Hinkley test on a loss per window (Page 1954): rises that persist, not single peaks.

    Args:
        slack: rise per window that counts as noise.
        threshold: accumulated rise that counts as drift.
        warmup: windows before the first alarm: losses fall fast while a model is new.
    """

    def __init__(self, slack: float = 0.002, threshold: float = 0.01, warmup: int = 5) -> None:
        self.slack, self.threshold, self.warmup = slack, threshold, warmup
        self.state = [0.0, 0.0, 0.0]  # windows, mean, accumulated rise

    def update(self, loss: float) -> bool:
        """Take a window's loss; True when it shows drift (the test then starts over)."""
        windows, mean, risen = self.state
        windows += 1
        mean += (loss - mean) / min(windows, 10)
        risen = max(0.0, risen + loss - mean - self.slack)
        drifted = windows > self.warmup and risen > self.threshold
        self.state = [0.0, 0.0, 0.0] if drifted else [windows, mean, risen]
        return drifted
