"""Cheaper scores: stop the scoring run once the order of the examples has settled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's correlation of two scores of the same examples, ties at their mean rank.

    Raises:
        ConfigError: fewer than two examples, or lengths that differ.
    """
    from scipy.stats import rankdata

    if len(first) != len(second) or len(first) < 2:
        raise ConfigError("scores", (len(first), len(second)), "two scores of 2 or more examples")
    left, right = rankdata(first), rankdata(second)
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale > 0 else 1.0


class ScoringStopper:
    """Says when AUM's order changes so little between epochs that more scoring adds nothing.

    Args:
        threshold: rank correlation of successive epochs' AUM above which the order has settled.
        patience: epochs in a row that must exceed it.
    """

    def __init__(self, threshold: float = 0.98, patience: int = 1) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError("threshold", threshold, "a correlation in (0, 1]")
        if patience < 1:
            raise ConfigError("patience", patience, "a number of epochs >= 1")
        self._threshold, self._patience = threshold, patience
        self._last: NDArray[np.float64] | None = None
        self._calm = 0
        self.correlations: list[float] = []

    def update(self, aum: NDArray[np.float64]) -> bool:
        """Take an epoch's AUM (of the same examples, in the same order); True means stop."""
        if self._last is not None:
            self.correlations.append(rank_correlation(self._last, aum))
            self._calm = self._calm + 1 if self.correlations[-1] > self._threshold else 0
        self._last = aum.copy()
        return self._calm >= self._patience
