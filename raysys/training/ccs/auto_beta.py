"""Cutoff rate by cross-validation: ``beta="auto"``, on held-out training data, never on test data.

A part of the training set is held out; for each candidate a few short proxies train on coresets of
the rest, and the candidate in the middle of the best held-out accuracies wins. The CCS paper tunes
beta by grid search; the released script's figures are the best over test evaluations, which we do
not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raysys.config import check, check_range
from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs.hashing import keyed_hash
from raysys.training.ccs.selection import SelectionConfig, select_ccs
from raysys.training.ccs.table import ScoreTable

_HOLDOUT_KEY = 0x686F6C64  # so that the held-out part is not where the coreset's hashes are small


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AutoBetaConfig:
    """The search.

    Args:
        betas: candidates, ascending.
        holdout: share of the training set to hold out.
        min_holdout: hold out at least this many examples where that is at most a fifth of all.
        repeats: proxies per candidate, each with its own coreset seed and weights.
        seed: seed of the held-out part, the coresets and the proxies.
    """

    betas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
    holdout: float = 0.05
    min_holdout: int = 2000
    repeats: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "holdout", 0, 0.5, low_open=True)
        check_range(self, "min_holdout", 0)
        check_range(self, "repeats", 1)
        ascending = list(self.betas) == sorted(set(self.betas)) and len(self.betas) > 0
        check(self, "betas", ascending, "ascending rates, at least one")
        inside = all(0 <= beta < 1 for beta in self.betas)
        check(self, "betas", inside, "rates in [0, 1)")

    def holdout_rows(self, rows: int) -> int:
        """Number of examples to hold out of ``rows``."""
        return max(1, int(self.holdout * rows), min(self.min_holdout, rows // 5))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BetaTrial:
    """One proxy to train: on ``ids``, with ``seed``."""

    beta: float
    seed: int
    ids: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BetaPlan:
    """All proxies of a search and the ids that they are judged on."""

    trials: tuple[BetaTrial, ...]
    holdout_ids: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class BetaChoice:
    """The winner, and each candidate's mean held-out accuracy.

    Args:
        plateau: candidates that cannot be told from the best one; ``beta`` is its middle.
        tolerance: standard error of a difference between two candidates.
    """

    beta: float
    accuracy: dict[float, float]
    plateau: tuple[float, ...]
    tolerance: float


def plan_beta_trials(
    table: ScoreTable,
    m: int,
    config: AutoBetaConfig,
    selection: SelectionConfig | None = None,
    *,
    score: str = "aum",
) -> BetaPlan:
    """Hold out a part and select one coreset per candidate and repeat from the rest.

    Candidates that would leave fewer than ``m`` examples are passed over.

    Raises:
        InfeasibleError: no candidate leaves ``m`` examples.
        ConfigError: bad ``m`` or a table without the scores.
    """
    base = selection or SelectionConfig()
    hashes = keyed_hash(table.ids, config.seed ^ _HOLDOUT_KEY)
    order = np.argsort(hashes, kind="stable")
    held = config.holdout_rows(len(table))
    rest = table.take(np.sort(order[held:]))
    trials = []
    for beta in config.betas:
        if m > len(rest) - math.floor(beta * len(rest) + 1e-9):
            continue
        for repeat in range(config.repeats):
            seed = config.seed * 1000 + repeat
            one = dataclasses.replace(base, beta=beta, seed=seed)
            trials.append(BetaTrial(beta, seed, select_ccs(rest, m, one, score=score).ids))
    if not trials:
        reason = f"{held} of {len(table)} examples are held out and {m} are wanted"
        raise InfeasibleError("beta='auto'", reason, "Give beta, or lower m or holdout")
    return BetaPlan(tuple(trials), np.sort(table.ids[order[:held]]))


def choose_beta(plan: BetaPlan, accuracy: Sequence[float]) -> BetaChoice:
    """Pick the middle of the candidates that cannot be told from the best.

    A few proxies on some thousand held-out examples cannot tell candidates half a point apart, and
    accuracy falls steeply beyond a plateau's edges; so the pick is the middle of the neighbours
    within one standard error of the best (of two middles, the more accurate), not its luckiest
    member. With a single repeat there is no error estimate and the best wins.

    Args:
        accuracy: held-out accuracy of each trial's proxy, in the plan's order.

    Raises:
        ConfigError: another number of accuracies than trials, or one is not finite.
    """
    if len(accuracy) != len(plan.trials) or not np.isfinite(accuracy).all():
        wanted = f"{len(plan.trials)} finite accuracies, one per trial"
        raise ConfigError("accuracy", list(accuracy), wanted)
    betas = sorted({trial.beta for trial in plan.trials})
    runs = [[a for trial, a in zip(plan.trials, accuracy) if trial.beta == b] for b in betas]
    means = [float(np.mean(run)) for run in runs]
    repeats = min(len(run) for run in runs)
    pooled = float(np.mean([np.var(run, ddof=1) for run in runs])) if repeats > 1 else 0.0
    tolerance = math.sqrt(2 * pooled / repeats)
    best = max(range(len(betas)), key=lambda index: (means[index], -index))
    low = high = best
    while low > 0 and means[low - 1] >= means[best] - tolerance:
        low -= 1
    while high < len(betas) - 1 and means[high + 1] >= means[best] - tolerance:
        high += 1
    middles = sorted({(low + high) // 2, (low + high + 1) // 2})
    chosen = max(middles, key=lambda index: (means[index], -index))
    plateau = tuple(betas[low : high + 1])
    return BetaChoice(betas[chosen], dict(zip(betas, means)), plateau, tolerance)
