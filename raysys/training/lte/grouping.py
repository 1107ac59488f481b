"""Groups of neurons: k-means in which every cluster has exactly E members (section 4.1).

The paper clusters input weights with an exact min-cost-flow library, which takes very long at
11,008 neurons. Ours alternates a greedy assignment under capacity with pairwise swaps, and ends
with one optimal assignment to the final centres where the layer is small enough.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from raysys.training.lte.config import Grouping, require
from raysys.training.lte.errors import LTEDataError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

OPTIMAL_UP_TO = 2048  # neurons; beyond this the exact assignment takes longer than all the rest
_SWAP_ROUNDS = 200


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """A partition of a layer's neurons.

    Args:
        labels: int64 [f], expert of each neuron; each expert has exactly E.
        objective: sum of the cosine similarities between neurons and their cluster's centre.
    """

    labels: Labels
    objective: float

    @property
    def permutation(self) -> NDArray[np.int32]:
        """int32 [f]: original index of each neuron in expert order; stable inside an expert."""
        return np.argsort(self.labels, kind="stable").astype(np.int32)


def expert_count(neurons: int, expert_size: int) -> int:
    """Number of experts of a layer.

    Raises:
        LTEConfigError: the experts do not divide the layer exactly.
    """
    fits = 0 < expert_size <= neurons and neurons % expert_size == 0
    divisors = [e for e in (64, 48, 32, 24, 16, 12, 8) if neurons % e == 0]
    remedy = f"Sizes that fit include {divisors}" if divisors else "Choose a divisor"
    require("expert_size", expert_size, fits, f"a divisor of the {neurons} neurons", remedy)
    return neurons // expert_size


def group(features: Floats, expert_size: int, method: Grouping = "kmeans", seed: int = 0) -> Groups:
    """Partition neurons into experts.

    Args:
        features: float [f, d], one row per neuron: its input weights, or for ``"coactivation"`` its
            activations over a sample of tokens.
        method: ``"kmeans"`` and ``"coactivation"`` cluster the rows; ``"random"``; ``"order"``.

    Raises:
        LTEConfigError: the size does not divide f.
        LTEDataError: the features are not finite.
    """
    features = np.asarray(features, dtype=np.float32)
    count = expert_count(len(features), expert_size)
    if not np.isfinite(features).all():
        raise LTEDataError("weights", "hold NaN or infinity", "Repair the dense checkpoint first")
    if method in ("kmeans", "coactivation"):
        return balanced_kmeans(features, count, expert_size, seed)
    labels = np.repeat(np.arange(count), expert_size)
    if method == "random":
        labels = np.random.default_rng(seed).permutation(labels)
    x = normalise(features)
    centres = _centres(x, labels, np.zeros((count, x.shape[1]), np.float32))
    return Groups(labels, _objective(x @ centres.T, labels))


def balanced_kmeans(
    features: Floats,
    count: int,
    size: int,
    seed: int,
    iterations: int = 10,
    tolerance: float = 1e-4,
) -> Groups:
    """Spherical k-means with clusters of equal size; deterministic for a seed."""
    rng = np.random.default_rng(seed)
    x = normalise(features)
    zero = ~np.any(x, axis=1)
    centres = _seed_centres(x, count, rng)
    labels, best = np.zeros(len(x), np.int64), -np.inf
    for _ in range(iterations):
        similarity = x @ centres.T
        found = _swap(similarity, _greedy(similarity, zero, size), size)
        centres = _centres(x, found, centres)
        objective = _objective(x @ centres.T, found)
        gain = objective - best
        if gain > 0:
            labels, best = found, objective
        if gain < tolerance * max(1.0, abs(best)):
            break
    if len(x) <= OPTIMAL_UP_TO:
        labels, best = _polish(x, labels, centres, best, size)
    return Groups(labels, best)


def normalise(rows: Floats) -> Floats:
    """Rows of length one; rows of zeros stay as they are."""
    norm = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    result: Floats = (rows / np.where(norm > 0, norm, 1.0)).astype(np.float32)
    return result


def _seed_centres(x: Floats, count: int, rng: np.random.Generator) -> Floats:
    """k-means++ on the sphere; equal rows are drawn again only when nothing else is left."""
    chosen = [int(rng.integers(len(x)))]
    distance = np.maximum(0.0, 2.0 - 2.0 * (x @ x[chosen[0]]).astype(np.float64))
    while len(chosen) < count:
        distance[chosen] = 0.0
        total = distance.sum()
        weights = distance / total if total > 1e-9 else None
        pick = int(rng.choice(len(x), p=weights))
        chosen.append(pick)
        distance = np.minimum(distance, np.maximum(0.0, 2.0 - 2.0 * (x @ x[pick])))
    return x[chosen].copy()


def _greedy(similarity: Floats, zero: NDArray[Any], size: int) -> Labels:
    """Each row takes its best centre with room; rows that have most to lose choose first."""
    top = -np.partition(-similarity, 1, axis=1)[:, :2] if similarity.shape[1] > 1 else None
    margin = top[:, 0] - top[:, 1] if top is not None else np.zeros(len(similarity))
    margin = np.where(zero, -1.0, margin)
    preference = np.argsort(-similarity, axis=1, kind="stable")
    room = np.full(similarity.shape[1], size)
    labels = np.empty(len(similarity), np.int64)
    for row in np.argsort(-margin, kind="stable"):
        for centre in preference[row]:
            if room[centre]:
                room[centre] -= 1
                labels[row] = centre
                break
    return labels


def _swap(similarity: Floats, labels: Labels, size: int) -> Labels:
    """Exchange pairs of neurons between clusters as long as that raises the total similarity."""
    labels = labels.copy()
    count = similarity.shape[1]
    for _ in range(_SWAP_ROUNDS):
        members = np.argsort(labels, kind="stable").reshape(count, size)
        own = similarity[members, np.arange(count)[:, None]]
        change = similarity[members] - own[:, :, None]  # [cluster, member, other cluster]
        best = change.max(axis=1)
        gain = best + best.T
        np.fill_diagonal(gain, -np.inf)
        if not _apply_swaps(labels, members, change, gain):
            break
    return labels


def _apply_swaps(labels: Labels, members: NDArray[np.int64], change: Floats, gain: Floats) -> bool:
    """Carry out the best swaps that do not share a cluster; whether there was one."""
    first, second = np.nonzero(np.triu(gain > 1e-6))
    order = np.argsort(-gain[first, second], kind="stable")
    used: set[int] = set()
    for a, b in zip(first[order].tolist(), second[order].tolist()):
        if a in used or b in used:
            continue
        used |= {a, b}
        labels[members[a, change[a, :, b].argmax()]] = b
        labels[members[b, change[b, :, a].argmax()]] = a
    return bool(used)


def _centres(x: Floats, labels: Labels, previous: Floats) -> Floats:
    count = len(previous)
    sums = np.zeros((count, x.shape[1]), np.float64)
    np.add.at(sums, labels, x)
    centres = normalise(sums.astype(np.float32))
    empty = ~np.any(centres, axis=1)
    centres[empty] = previous[empty]
    return centres


def _polish(
    x: Floats, labels: Labels, centres: Floats, objective: float, size: int
) -> tuple[Labels, float]:
    """One optimal assignment to the final centres, kept where it is better."""
    similarity = x @ centres.T
    rows, columns = linear_sum_assignment(np.repeat(similarity, size, axis=1), maximize=True)
    found = np.empty_like(labels)
    found[rows] = columns // size
    better = _objective(x @ _centres(x, found, centres).T, found)
    return (found, better) if better > objective else (labels, objective)


def _objective(similarity: Floats, labels: Labels) -> float:
    return float(similarity[np.arange(len(labels)), labels].sum(dtype=np.float64))
