"""Clusters the updates of one round: k-means on the unit sphere, stability, leave-one-out labels.

Updates of different rounds start from different weights and cannot be compared, so no centroid is
ever kept. What persists is each client's label; a round's centroids are made from this round's
updates of clients whose label is remembered (paper, section 4.2). We differ in leaving a client
out of the centroid that it is compared with: in many dimensions a client's own update in its
centroid alone makes labels look stable.

Dimensions: n participants, D sketch dimensions, K clusters, G random starts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
NONE = -1
TINY = 1e-12
FEWEST_STARTS = 4
SETTLED = 0.97  # the last steps move a point or two and hardly the centroids
MOST_ROWS = 256  # participants that a measure of stability looks at


def unit_rows(sketch_nD: npt.ArrayLike) -> FloatArray:
    """Centre by the mean and scale each row to length 1 (cosine geometry); equal rows give 0."""
    values = np.asarray(sketch_nD, dtype=np.float64)
    centred = values - values.mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    # Rows that differ by rounding only carry no direction.
    scale = np.maximum(np.abs(values).max(initial=0.0), TINY)
    return np.where(length > 1e-9 * scale, centred / np.maximum(length, TINY), 0.0)


def kmeans(
    points_nD: FloatArray,
    k: int,
    rng: np.random.Generator,
    starts: int = 0,
    steps: int = 25,
    settled: float = 1.0,
) -> tuple[IntArray, FloatArray]:
    """Labels int64 [n] and centroids [K, D] of the best of several starts (0: two for each part).

    k-means++ seeding, then Lloyd's steps, all starts in one program: a round's clusterings are
    many and tiny, so that a library's call overhead would exceed their arithmetic. With 4 starts
    eight parts of a dozen points each were found too seldom for a split (one seed in three).
    A start ends when the share ``settled`` of its labels stays in a step.
    """
    starts = starts or max(FEWEST_STARTS, 2 * k)
    n = len(points_nD)
    centroids = _seed(points_nD, k, rng, starts)
    labels = np.full((n, starts), NONE)
    moving = np.arange(starts)  # starts whose labels still change
    for _ in range(steps):
        flat = centroids[moving].reshape(-1, points_nD.shape[1])
        # A point's own length shifts its distances alike.
        gap = (flat**2).sum(axis=1) - 2 * (points_nD @ flat.T)
        found = gap.reshape(n, len(moving), k).argmin(axis=2)
        changed = (found != labels[:, moving]).sum(axis=0) > n * (1 - settled)
        if not changed.any():
            break
        moving, found = moving[changed], found[:, changed]
        labels[:, moving] = found
        member = np.zeros((n, len(moving) * k))
        member[np.arange(n)[:, None], found + k * np.arange(len(moving))] = 1.0
        count = member.sum(axis=0)[:, None]
        means = (member.T @ points_nD) / np.maximum(count, 1)
        flat = np.where(count > 0, means, centroids[moving].reshape(means.shape))
        centroids[moving] = flat.reshape(len(moving), k, -1)
    chosen = centroids[np.arange(starts), labels]
    cost = ((points_nD[:, None] - chosen) ** 2).sum(axis=(0, 2))
    best = int(cost.argmin())
    return labels[:, best], centroids[best]


def nearest(points_nD: FloatArray, centroids_KD: FloatArray) -> IntArray:
    """Index of the nearest centroid of each point."""
    found: IntArray = _squared(points_nD, centroids_KD).argmin(axis=1)
    return found


def leave_one_out(points_nD: FloatArray, labels_n: IntArray, k: int, own: bool = False) -> IntArray:
    """Nearest centroid of every participant, its own update left out.

    Args:
        labels_n: remembered label, or NONE. own: keep a client's own update (the printed rule).

    Returns:
        New labels int64 [n]; a cluster that only the client itself remembers is closed to it.
    """
    member = (labels_n[:, None] == np.arange(k)).astype(np.float64)
    count = member.sum(axis=0)
    sums = member.T @ points_nD
    centroids = sums / np.maximum(count, 1)[:, None]
    distance = _squared(points_nD, centroids)
    distance[:, count == 0] = np.inf
    if not own:
        rows = np.flatnonzero(labels_n >= 0)
        mine = labels_n[rows]
        left = count[mine] - 1
        without = (sums[mine] - points_nD[rows]) / np.maximum(left, 1)[:, None]
        gap = ((points_nD[rows] - without) ** 2).sum(axis=1)
        distance[rows, mine] = np.where(left > 0, gap, np.inf)
    blind = ~np.isfinite(distance).any(axis=1)
    found = distance.argmin(axis=1)
    return np.where(blind, labels_n, found)


def adjusted_rand(first: IntArray, second: IntArray) -> float:
    """Adjusted Rand index of two labellings (Hubert and Arabie 1985); 1 for two trivial ones."""
    table = np.zeros((int(first.max(initial=0)) + 1, int(second.max(initial=0)) + 1))
    np.add.at(table, (first, second), 1)
    pairs = (table * (table - 1)).sum() / 2
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    a, b = (rows * (rows - 1)).sum() / 2, (columns * (columns - 1)).sum() / 2
    total = len(first) * (len(first) - 1) / 2
    expected = a * b / total if total else 0.0
    highest = (a + b) / 2
    return 1.0 if highest == expected else float((pairs - expected) / (highest - expected))


def split_half_stability(points_nD: FloatArray, k: int, rng: np.random.Generator) -> float:
    """Agreement of the clusterings of two random halves, as labels of all points; 0 if too few.

    Structure that is really there is found from either half; an arbitrary cut is not. Of many
    points a random part is looked at, which keeps the cost of a large round down.
    """
    n = min(len(points_nD), MOST_ROWS)
    if n < 2 * k:
        return 0.0
    points_nD = points_nD[rng.permutation(len(points_nD))[:n]]
    order = np.arange(n)
    halves = [order[: n // 2], order[n // 2 :]]
    found = [
        nearest(points_nD, kmeans(points_nD[half], k, rng, settled=SETTLED)[1]) for half in halves
    ]
    if len(np.unique(found[0])) < 2 or len(np.unique(found[1])) < 2:
        return 0.0
    return adjusted_rand(found[0], found[1])


def _seed(points_nD: FloatArray, k: int, rng: np.random.Generator, starts: int) -> FloatArray:
    """k-means++ seeds, [G, K, D] (Arthur and Vassilvitskii 2007)."""
    n = len(points_nD)
    chosen = np.empty((starts, k, points_nD.shape[1]))
    chosen[:, 0] = points_nD[rng.integers(n, size=starts)]
    gap = np.full((starts, n), np.inf)
    for part in range(1, k):
        gap = np.minimum(gap, _squared(points_nD, chosen[:, part - 1]).T)
        total = gap.cumsum(axis=1)
        draw = rng.random(starts) * np.maximum(total[:, -1], TINY)
        picked = np.minimum((total < draw[:, None]).sum(axis=1), n - 1)
        chosen[:, part] = points_nD[picked]
    return chosen


def _squared(points_nD: FloatArray, centroids_KD: FloatArray) -> FloatArray:
    """Squared distances [n, K]."""
    own = (points_nD**2).sum(axis=1)[:, None]
    other = (centroids_KD**2).sum(axis=1)
    gaps: FloatArray = np.maximum(own + other - 2 * points_nD @ centroids_KD.T, 0.0)
    return gaps
