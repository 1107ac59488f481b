"""How many labels are wrong: AUM against threshold examples (Pleiss et al., NeurIPS 2020).

Some examples get a fake extra class, which no network can learn from them; their AUM shows how
low a wrong label's margin lies, and examples below a percentile of it are taken as mislabelled.
Two runs with disjoint threshold sets cover every example.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError
from raysys.training.ccs.hashing import keyed_hash

IntArray = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class NoiseEstimate:
    """Estimate of the label noise.

    Args:
        rate: share of the judged examples below the threshold.
        threshold: the AUM percentile of the threshold examples.
        suspects: ids judged mislabelled, ascending.
    """

    rate: float
    threshold: float
    suspects: IntArray


def threshold_halves(ids: IntArray, classes: int, seed: int = 0) -> tuple[IntArray, IntArray]:
    """Two disjoint sets of ids, each ``N / (classes + 1)`` large, to be relabelled one per run.

    Raises:
        ConfigError: too few examples for one of each.
    """
    size = len(ids) // (classes + 1)
    if size < 1 or 2 * size > len(ids):
        raise ConfigError("ids", len(ids), f"at least {classes + 1} examples and 2 classes")
    order = ids[np.argsort(keyed_hash(ids, seed), kind="stable")]
    return np.sort(order[:size]), np.sort(order[size : 2 * size])


def relabel(ids: IntArray, labels: IntArray, fake: IntArray, classes: int) -> IntArray:
    """Labels of a threshold run: class ``classes`` (one more than exist) for the fake ids."""
    return np.where(np.isin(ids, fake), classes, labels).astype(np.int64)


def estimate_noise(
    ids: IntArray, aum: NDArray[np.float64], fake: IntArray, percentile: float = 99.0
) -> NoiseEstimate:
    """Judge the examples of one threshold run, all but its fake ones.

    Args:
        aum: AUM of each id in the run with ``classes + 1`` classes.
        percentile: of the threshold examples' AUM, below which a label counts as wrong.

    Raises:
        ConfigError: a percentile outside (0, 100], or no example on one side.
    """
    if not 0 < percentile <= 100:
        raise ConfigError("percentile", percentile, "a number in (0, 100]")
    is_fake = np.isin(ids, fake)
    if not is_fake.any() or is_fake.all():
        raise ConfigError("fake", int(is_fake.sum()), f"some of the {len(ids)} ids, not all")
    threshold = float(np.percentile(aum[is_fake], percentile))
    wrong = ~is_fake & (aum <= threshold)
    return NoiseEstimate(float(wrong.sum() / (~is_fake).sum()), threshold, np.sort(ids[wrong]))


def combine(first: NoiseEstimate, second: NoiseEstimate) -> NoiseEstimate:
    """Both runs together: suspects of either (each judges the other's threshold examples)."""
    return NoiseEstimate(
        (first.rate + second.rate) / 2,
        (first.threshold + second.threshold) / 2,
        np.union1d(first.suspects, second.suspects),
    )
