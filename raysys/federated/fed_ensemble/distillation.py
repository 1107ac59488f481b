"""One student from an ensemble, on inputs without labels: K models' knowledge at one model's cost.

The student learns the ensemble's probabilities (Hinton et al. 2015; for federated ensembles Lin et
al. 2020, FedDF). It keeps most of the accuracy and none of the disagreement, so its quality is
reported apart from the ensemble's.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from raysys.config import check_range
from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights, ModelSpec, flatten, load_flat
from raysys.federated.core.randomness import Purpose, generator

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Training of the student: minibatch SGD on the cross-entropy to soft targets."""

    epochs: int = 5
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, "epochs", 1)
        check_range(self, "batch_size", 1)
        check_range(self, "lr", 0, low_open=True)
        check_range(self, "momentum", 0, 1, high_open=True)


def distil(
    spec: ModelSpec,
    start: FlatWeights,
    inputs: npt.NDArray[np.float32],
    probabilities: FloatArray,
    config: DistillConfig | None = None,
    seed: int = 0,
) -> FlatWeights:
    """Train a student from ``start`` to give ``probabilities`` [N, C] on ``inputs`` [N, ...].

    Raises:
        ConfigError: probabilities that are none, or of another number of samples.
    """
    config = config or DistillConfig()
    sums = probabilities.sum(axis=1)
    if len(probabilities) != len(inputs) or not np.allclose(sums, 1, atol=1e-5):
        raise ConfigError("probabilities", probabilities.shape, "rows that sum to 1, one per input")
    module = load_flat(spec.architecture.build(), start)
    optimiser = torch.optim.SGD(module.parameters(), lr=config.lr, momentum=config.momentum)
    x, soft = torch.from_numpy(inputs), torch.from_numpy(probabilities.astype(np.float32))
    rng = generator(seed, Purpose.BATCHES, 0, 2**62)
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(inputs)))
        for batch in torch.split(order, config.batch_size):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(module(x[batch]), soft[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return flatten(module)
