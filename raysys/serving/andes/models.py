"""Step time and restore cost, learned while serving.

Andes (arXiv 2404.16283) models token latency by the batch size alone, because in a live system
batch and total context are almost collinear. We fit ``L = a + b B + c P + e K`` (batch, prefill
tokens, total context) with non-negative coefficients by exponentially weighted least squares, and
keep the last good fit when the new one predicts badly.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysys.config import check_range
from raysys.errors import ConfigError
from raysys.serving.andes.snapshot import FloatArray

COEFFICIENTS = ("base_s", "per_sequence_s", "per_prefill_token_s", "per_context_token_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Coefficients of the step time in seconds; all non-negative.

    Args:
        base_s: a, an empty step.
        per_sequence_s: b, for each decoding sequence.
        per_prefill_token_s: c, for each prompt token computed in the step.
        per_context_token_s: e, for each token of KV that the batch attends to.
    """

    base_s: float = 0.050
    per_sequence_s: float = 0.0005
    per_prefill_token_s: float = 1.0 / 8000.0
    per_context_token_s: float = 0.0

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            check_range(self, name, 0.0)

    def predict(
        self,
        batch: npt.ArrayLike,
        prefill_tokens: npt.ArrayLike = 0.0,
        context_tokens: npt.ArrayLike = 0.0,
    ) -> FloatArray:
        """Step time in seconds; broadcasts; never below one microsecond."""
        total = (
            self.base_s
            + self.per_sequence_s * np.asarray(batch, dtype=np.float64)
            + self.per_prefill_token_s * np.asarray(prefill_tokens, dtype=np.float64)
            + self.per_context_token_s * np.asarray(context_tokens, dtype=np.float64)
        )
        return np.maximum(total, 1e-6)


class LatencyModel:
    """Online fit of :class:`StepTime`; constant memory.

    Args:
        initial: the seed, from a profile or a guess; used until ``warm_up`` steps were seen.
        half_life: number of steps after which an observation counts half.
        warm_up: steps before the first fit replaces the seed.
        refit_every: steps between fits.
    """

    def __init__(
        self,
        initial: StepTime | None = None,
        *,
        half_life: int = 2000,
        warm_up: int = 64,
        refit_every: int = 64,
    ) -> None:
        for name, value in (("half_life", half_life), ("warm_up", warm_up)):
            if value < 1:
                raise ConfigError(name, value, "at least 1")
        self.step_time = initial or StepTime()
        self.observed = 0
        self.error = 0.0  # EWMA of |predicted - actual| / actual
        self.rejected_fits = 0
        self._decay = 0.5 ** (1.0 / half_life)
        self._warm_up = warm_up
        self._refit_every = refit_every
        self._gram = np.zeros((4, 4))
        self._moment = np.zeros(4)
        self._power = 0.0

    def predict(
        self,
        batch: npt.ArrayLike,
        prefill_tokens: npt.ArrayLike = 0.0,
        context_tokens: npt.ArrayLike = 0.0,
    ) -> FloatArray:
        """Step time in seconds under the current fit."""
        return self.step_time.predict(batch, prefill_tokens, context_tokens)

    def observe(self, batch: int, prefill_tokens: int, context_tokens: int, seconds: float) -> None:
        """Add one executed step; absurd ones (not finite, not positive) are left out."""
        if not (math.isfinite(seconds) and seconds > 0.0):
            return
        predicted = float(self.predict(batch, prefill_tokens, context_tokens))
        self.error += 0.02 * (abs(predicted - seconds) / seconds - self.error)
        # Relative least squares: a 5 ms step matters as much as a 500 ms one.
        row = np.array([1.0, batch, prefill_tokens, context_tokens]) / seconds
        self._gram = self._gram * self._decay + np.outer(row, row)
        self._moment = self._moment * self._decay + row
        self._power = self._power * self._decay + 1.0
        self.observed += 1
        if self.observed >= self._warm_up and self.observed % self._refit_every == 0:
            self._refit()

    def _refit(self) -> None:
        coefficients, residual = non_negative_fit(self._gram, self._moment, self._power)
        if not np.isfinite(coefficients).all() or residual > 0.5:
            self.rejected_fits += 1
            return
        self.step_time = StepTime(**dict(zip(COEFFICIENTS, map(float, coefficients))))


def fit_step_time(
    batch: npt.ArrayLike,
    prefill_tokens: npt.ArrayLike,
    context_tokens: npt.ArrayLike,
    seconds: npt.ArrayLike,
) -> tuple[StepTime, float]:
    """Fit a whole step log at once.

    Args:
        batch, prefill_tokens, context_tokens, seconds: shape (T,), one entry per step.

    Returns:
        The coefficients and the root mean square *relative* residual.

    Raises:
        ConfigError: fewer than 8 usable steps, or lengths differ.
    """
    columns = [np.asarray(x, dtype=np.float64) for x in (batch, prefill_tokens, context_tokens)]
    time_T = np.asarray(seconds, dtype=np.float64)
    if any(column.shape != time_T.shape for column in columns):
        raise ConfigError("seconds", time_T.shape, "as many entries as the other columns")
    good = np.isfinite(time_T) & (time_T > 0)
    if good.sum() < 8:
        raise ConfigError("seconds", int(good.sum()), "at least 8 steps with a positive time")
    rows = np.stack([np.ones(time_T.size), *columns], axis=1)[good] / time_T[good, None]
    coefficients, residual = non_negative_fit(rows.T @ rows, rows.sum(axis=0), float(good.sum()))
    return StepTime(**dict(zip(COEFFICIENTS, map(float, coefficients)))), residual


def non_negative_fit(
    gram: FloatArray, moment: FloatArray, power: float
) -> tuple[FloatArray, float]:
    """Least squares with coefficients >= 0 from normal equations, for up to a handful of columns.

    Every support set is solved (15 for four columns) and the best feasible one wins: exact, and
    without the degenerate steps of an active-set method.

    Args:
        gram: (P, P) sum of x x^T.
        moment: (P,) sum of x y, where y is scaled to 1.
        power: sum of y^2.

    Returns:
        (P,) coefficients and the root mean square residual.
    """
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    gram = gram / np.outer(scale, scale)
    moment = moment / scale
    best, best_error = np.zeros(moment.size), power
    for size in range(1, moment.size + 1):
        for support in itertools.combinations(range(moment.size), size):
            pick = list(support)
            ridge = gram[np.ix_(pick, pick)] + 1e-9 * np.eye(size)
            solution = np.linalg.solve(ridge, moment[pick])
            error = power - float(solution @ moment[pick])
            if (solution >= 0.0).all() and error < best_error - 1e-12 * power:
                best = np.zeros(moment.size)
                best[pick] = solution
                best_error = error
    return best / scale, math.sqrt(max(0.0, best_error) / max(power, 1e-300))


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreModel:
    """Seconds that bringing a request back adds to the steps of everyone.

    Args:
        per_token_s: prefill time per missing token.
        fixed_s: constant part per restore.
        swap_per_token_s: copying KV back per token from a host tier, or None if there is none.
            The cheaper way counts.
    """

    per_token_s: float = 1.0 / 8000.0
    fixed_s: float = 0.0
    swap_per_token_s: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "per_token_s", 0.0)
        check_range(self, "fixed_s", 0.0)
        if self.swap_per_token_s is not None:
            check_range(self, "swap_per_token_s", 0.0)

    def cost(self, tokens_missing: npt.ArrayLike) -> FloatArray:
        """Seconds of step time for restoring ``tokens_missing`` tokens; 0 for none."""
        tokens = np.asarray(tokens_missing, dtype=np.float64)
        per_token = self.per_token_s
        if self.swap_per_token_s is not None:
            per_token = min(per_token, self.swap_per_token_s)
        return np.where(tokens > 0, self.fixed_s + per_token * tokens, 0.0)
