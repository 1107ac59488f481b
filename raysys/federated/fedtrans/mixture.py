"""Soft aggregation: young models borrow weights from their ancestors, less and less as they age.

Section 5 of the paper. Where we differ: the coefficients sum to one (as printed they shrink the
weights every round), the decay counts the receiving model's age and not the job's rounds, and a
relative's weights come through the stored unit maps instead of by position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysys.federated.core.model import FlatWeights
from raysys.federated.fedtrans.config import MixtureConfig
from raysys.federated.fedtrans.lineage import Model, ancestors, crop, project, similarity


def mixed(
    family: Sequence[Model],
    weights: Sequence[FlatWeights],
    index: int,
    round_id: int,
    config: MixtureConfig,
) -> FlatWeights:
    """A model's weights after borrowing from its living ancestors, float32 [P].

    Args:
        weights: un-mixed weights of every model after its own server step.

    Returns:
        The very same array where there is nobody to borrow from.
    """
    own = weights[index]
    sources = [i for i in ancestors(family, index)[1:] if family[i].retired is None]
    if not (config.enabled and sources):
        return own
    clock = round_id - family[index].created if config.clock == "age" else round_id
    total = own.astype(np.float64)
    divisor: npt.NDArray[np.float64] = np.ones(len(own))
    for source in sources:
        alike = similarity(family, source, index)
        share = config.eta**clock * alike
        carry = project if config.projection == "lineage" else crop
        values, there = carry(family, weights[source], source, index)
        total[there] += share * values[there]
        divisor[there] += share if config.normalise else alike
    return (total / divisor).astype(np.float32)
