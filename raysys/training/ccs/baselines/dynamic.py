"""InfoBatch (Qin et al., ICLR 2024): dynamic pruning for speed, where CCS prunes for storage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError


class InfoBatch:
    """Each epoch drops a share of the examples whose last loss is below the mean.

    The low-loss examples that stay are weighted by ``1 / (1 - ratio)``, so that the expected
    gradient is unchanged; the last ``1 - delta`` of the epochs use everything.

    Args:
        rows: number of examples.
        epochs: length of the run.
        ratio: share of the low-loss examples to drop, in [0, 1).
        delta: share of the epochs that prune, in [0, 1].
    """

    def __init__(
        self, rows: int, epochs: int, *, ratio: float = 0.5, delta: float = 0.875, seed: int = 0
    ) -> None:
        if rows < 1:
            raise ConfigError("rows", rows, "at least one example")
        if not 0 <= ratio < 1:
            raise ConfigError("ratio", ratio, "a number in [0, 1)")
        if not 0 <= delta <= 1:
            raise ConfigError("delta", delta, "a number in [0, 1]")
        self._loss = np.full(rows, np.inf)  # never seen: never dropped
        self._last_pruned = int(epochs * delta)
        self._ratio = ratio
        self._seed = seed

    def update(self, rows: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Note the losses that a training step computed."""
        self._loss[rows] = losses

    def epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows of an epoch in random order, with the weight of each in the loss."""
        rng = np.random.default_rng([self._seed, epoch])
        seen = np.isfinite(self._loss)
        low = np.zeros(len(self._loss), np.bool_)
        if epoch < self._last_pruned and seen.any():
            low = seen & (self._loss < self._loss[seen].mean())
        dropped = low & (rng.random(len(low)) < self._ratio)
        rows = rng.permutation(np.flatnonzero(~dropped))
        weights = np.where(low, 1.0 / (1.0 - self._ratio), 1.0)
        return rows, weights[rows]

    def state_dict(self) -> dict[str, NDArray[np.float64]]:
        return {"loss": self._loss.copy()}

    def load_state_dict(self, state: dict[str, NDArray[np.float64]]) -> None:
        self._loss = np.asarray(state["loss"]).copy()
