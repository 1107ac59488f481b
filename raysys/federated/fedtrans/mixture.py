"""Soft aggregation: models borrow from their relatives, by how much they have in common.

Section 5 of the paper. Where we differ: updates are lent instead of weights, and both ways; the
coefficients sum to one (as printed they shrink the weights every round); a decay, if any, counts
the younger model's age and not the job's rounds; and what a relative lends comes through the stored
unit maps instead of by position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.model import FlatWeights
from raysys.federated.fedtrans.config import MixtureConfig
from raysys.federated.fedtrans.lineage import (
    Model,
    ancestors,
    crop,
    gather,
    project,
    similarity,
)
from raysys.federated.fedtrans.transform import Mask

Carry = Callable[[Sequence[Model], FlatWeights, int, int], tuple[FlatWeights, Mask]]


def borrowed(
    family: Sequence[Model],
    sums: Mapping[int, ModelSum],
    index: int,
    round_id: int,
    config: MixtureConfig,
) -> ModelSum:
    """The round's sums of a model with its relatives' added, before the server step.

    A child starts as the same function as its parent, so the update that the parent's clients
    found is training for it as well; and the child's update of what it has from its parent is
    training for the parent. Averaging weights instead pulls relatives together for as long as they
    count, and in the paper larger models that feed smaller ones so do harm.

    Args:
        sums: the round's sums by model; those of ``index`` must be there.
    """
    own = sums[index]
    delta, weight = own.delta.copy(), np.full(len(own.delta), own.weight)
    lenders = 0
    for source, share, _ in _relatives(family, index, round_id, config):
        total = sums.get(source)
        if total is not None and total.weight > 0:
            values, there = _carry(config)(family, _mean(total), source, index)
            delta[there] += share * total.weight * values[there]
            weight[there] += share * total.weight
            lenders += 1
    for source, share in _heirs(family, index, round_id, config):
        total = sums.get(source)
        if total is not None and total.weight > 0:
            values, there = gather(family, _mean(total), source, index)
            delta[there] += share * total.weight * values[there]
            weight[there] += share * total.weight
            lenders += 1
    if not lenders:
        return own
    divided = np.divide(delta, weight, out=np.zeros_like(delta), where=weight > 0)
    return dataclasses.replace(own, delta=divided * own.weight)


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
    relatives = _relatives(family, index, round_id, config)
    if not relatives:
        return own
    total = own.astype(np.float64)
    divisor = np.ones(len(own))
    for source, share, alike in relatives:
        values, there = _carry(config)(family, weights[source], source, index)
        total[there] += share * values[there]
        divisor[there] += share if config.normalise else alike
    return (total / divisor).astype(np.float32)


def _relatives(
    family: Sequence[Model], index: int, round_id: int, config: MixtureConfig
) -> list[tuple[int, float, float]]:
    """Living ancestors with their share and their similarity."""
    clock = round_id - family[index].created if config.clock == "age" else round_id
    found = []
    for source in ancestors(family, index)[1:]:
        if family[source].retired is None:
            alike = similarity(family, source, index)
            found.append((source, config.eta**clock * alike, alike))
    return found


def _heirs(
    family: Sequence[Model], index: int, round_id: int, config: MixtureConfig
) -> list[tuple[int, float]]:
    """Living descendants with their share, which decays by their own age; none as printed."""
    if config.lend != "both":
        return []
    return [
        (heir, config.eta ** (round_id - model.created) * similarity(family, index, heir))
        for heir, model in enumerate(family)
        if heir > index and model.retired is None and index in ancestors(family, heir)
    ]


def _mean(total: ModelSum) -> FlatWeights:
    return total.mean().astype(np.float32)


def _carry(config: MixtureConfig) -> Carry:
    return project if config.projection == "lineage" else crop
