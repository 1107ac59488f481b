"""What Fed-ensemble must be compared with: cheap averages of one run, and dearer ensembles.

FedAvg with an exponential average of the server weights and the ensemble of the last K server
snapshots cost nothing and are the honest competitors; K independent runs at K times the budget are
the upper bound; FedBE (Chen and Chao 2021) samples models around the clients' mean.
"""

from __future__ import annotations

import collections

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights
from raysys.federated.core.randomness import Purpose, generator

FloatArray = npt.NDArray[np.float64]


class WeightAverage:
    """Exponential average of server weights: ``a = decay a + (1 - decay) w``, bias-corrected."""

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ConfigError("decay", decay, "a number in [0, 1)")
        self._decay = decay
        self._sum: FloatArray | None = None
        self._weight = 0.0

    def add(self, weights: FlatWeights) -> None:
        """Take the weights after a round."""
        if self._sum is None:
            self._sum = np.zeros(len(weights))
        self._sum = self._decay * self._sum + (1 - self._decay) * weights
        self._weight = self._decay * self._weight + (1 - self._decay)

    def weights(self) -> FlatWeights:
        """The average so far, float32 [P]."""
        if self._sum is None:
            raise ConfigError("average", "empty", "at least one round")
        return (self._sum / self._weight).astype(np.float32)


class Snapshots:
    """The last K server weights, taken every ``every`` rounds, as an ensemble."""

    def __init__(self, k: int, every: int = 1) -> None:
        if k < 1 or every < 1:
            raise ConfigError("snapshots", (k, every), "K and spacing of at least 1")
        self._every = every
        self._rounds = 0
        self._kept: collections.deque[FlatWeights] = collections.deque(maxlen=k)

    def add(self, weights: FlatWeights) -> None:
        """Take the weights after a round."""
        self._rounds += 1
        if self._rounds % self._every == 0:
            self._kept.append(weights.copy())

    def stacked(self) -> npt.NDArray[np.float32]:
        """The snapshots, float32 [<=K, P]."""
        if not self._kept:
            raise ConfigError("snapshots", self._rounds, f"at least {self._every} rounds")
        return np.stack(list(self._kept))


def fedbe_members(
    clients_kP: npt.NDArray[np.float32], n_samples: npt.NDArray[np.int64], draws: int, seed: int
) -> npt.NDArray[np.float32]:
    """FedBE's ensemble from the client models of a round: mean, clients, and Gaussian draws.

    The Gaussian has the weighted mean and the diagonal variance of the client models (section 4.2
    there). The distillation into one student is left out: the ensemble itself is compared.

    Args:
        clients_kP: weights of the client models. n_samples: their weights. draws: Gaussian models.

    Returns:
        Members, float32 [1 + k + draws, P].
    """
    share = n_samples / n_samples.sum()
    mean = share @ clients_kP.astype(np.float64)
    deviation = np.sqrt(share @ (clients_kP - mean) ** 2)
    noise = generator(seed, Purpose.INITIALISATION).standard_normal((draws, clients_kP.shape[1]))
    sampled = mean + noise * deviation
    members: npt.NDArray[np.float32] = np.concatenate([mean[None], clients_kP, sampled]).astype(
        np.float32
    )
    return members
