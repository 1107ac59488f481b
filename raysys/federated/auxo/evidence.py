"""Evidence for a split: what is left of the dispersion inside the clusters, without sample noise.

The printed criterion compares raw dispersions, which SGD noise dominates, so that it never fires.
A client's first and second half of steps use different samples, so the inner product of their
sketches a_i, b_i carries the client's signal and no sample noise: ``J = sum <a_i - a, b_i - b> /
(n - 1)`` estimates the signal's dispersion. The second half starts where the first ended, which
adds a negative term; with nearly equal clients J is zero or negative and says nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import eigsh

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RESAMPLES = 200
FEW_DIMS, MOST_PARTS = 512, 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dispersion:
    """Noise-corrected dispersion of a cohort and inside its clusters, with 90 % intervals."""

    total: float
    total_low: float
    total_high: float
    within: float
    within_low: float
    within_high: float

    @property
    def usable(self) -> bool:
        """Whether the total is significantly above zero."""
        return self.total_low > 0

    @property
    def ratio(self) -> float:
        """Share of the dispersion that is left inside the clusters; NaN where it means nothing."""
        return self.within / self.total if self.usable else float("nan")


class SignalSpace:
    """The directions in which clients really differ, learned from their halves over some rounds.

    The symmetric part of the cross-covariance of the halves is free of sample noise; its leading
    directions change slowly, so that they are averaged over rounds, though updates are not. Without
    halves (local noise, one step) the plain covariance serves, noise and all.
    """

    def __init__(self, dim: int, decay: float) -> None:
        self.cross = np.zeros((dim, dim), dtype=np.float64 if dim <= FEW_DIMS else np.float32)
        self._decay = decay
        self._basis: FloatArray | None = None

    def add(self, units_nD: FloatArray, first_nD: FloatArray | None, whole_nD: FloatArray) -> None:
        """Take a round: unit rows, and the halves behind them where there are any."""
        left, right = units_nD, units_nD
        if first_nD is not None:
            left = first_nD - first_nD.mean(axis=0)
            second = whole_nD - first_nD
            right = second - second.mean(axis=0)
            length = np.maximum(np.linalg.norm(left + right, axis=1, keepdims=True), 1e-12)
            left, right = left / length, right / length
        left, right = (side.astype(self.cross.dtype) for side in (left, right))
        product = left.T @ (right * ((1 - self._decay) / len(units_nD)))
        if first_nD is not None:
            product = (product + product.T) / 2
        product += self._decay * self.cross
        self.cross = product
        self._basis = None

    def project(self, units_nD: FloatArray, dims: int) -> FloatArray:
        """Coordinates [n, dims] in the leading directions."""
        return units_nD @ self.basis(dims)

    def without(self, rows_kD: FloatArray) -> SignalSpace:
        """A copy that knows nothing of the span of some directions."""
        axes, sizes, _ = np.linalg.svd(rows_kD.T, full_matrices=False)
        axes = axes[:, sizes > 1e-9 * sizes.max(initial=1e-12)]
        axes = axes.astype(self.cross.dtype)
        left = self.cross - axes @ (axes.T @ self.cross)
        copy = SignalSpace(len(self.cross), self._decay)
        copy.cross = left - (left @ axes) @ axes.T
        return copy

    def basis(self, dims: int) -> FloatArray:
        """The leading directions, [D, dims]."""
        if self._basis is None or self._basis.shape[1] < dims:
            if len(self.cross) <= FEW_DIMS:
                self._basis = np.linalg.eigh(self.cross)[1][:, ::-1]
            else:  # the few that are asked for, from a fixed start, so that a resumed job agrees
                some, start = max(dims, MOST_PARTS), np.ones_like(self.cross[0])
                values, vectors = eigsh(self.cross, k=some, which="LA", v0=start, tol=1e-4)
                self._basis = vectors[:, np.argsort(-values)]
        return self._basis[:, :dims]


def dispersion_terms(
    first_nD: FloatArray, second_nD: FloatArray, labels_n: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Each client's term of J_total and of J_within; the means of the terms are the two J.

    Args:
        labels_n: labels from earlier rounds; clients without one count in neither.
    """
    kept = labels_n >= 0
    a, b, labels = first_nD[kept], second_nD[kept], labels_n[kept]
    if len(a) < 2:
        return np.zeros(0), np.zeros(0)
    total = ((a - a.mean(axis=0)) * (b - b.mean(axis=0))).sum(axis=1) * len(a) / (len(a) - 1)
    within = np.full(len(a), np.nan)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            x, y = a[rows] - a[rows].mean(axis=0), b[rows] - b[rows].mean(axis=0)
            within[rows] = (x * y).sum(axis=1) * len(rows) / (len(rows) - 1)
    usable = np.isfinite(within)
    return total[usable], within[usable]


def dispersion(total: FloatArray, within: FloatArray, rng: np.random.Generator) -> Dispersion:
    """Means of the terms, with bootstrap intervals over clients."""
    if len(total) < 8:
        nothing = float("nan")
        return Dispersion(total=nothing, total_low=nothing, total_high=nothing,
                          within=nothing, within_low=nothing, within_high=nothing)  # fmt: skip
    drawn = rng.integers(len(total), size=(RESAMPLES, len(total)))
    t_low, t_high = np.percentile(total[drawn].mean(axis=1), (5, 95))
    w_low, w_high = np.percentile(within[drawn].mean(axis=1), (5, 95))
    return Dispersion(
        total=float(total.mean()),
        total_low=float(t_low),
        total_high=float(t_high),
        within=float(within.mean()),
        within_low=float(w_low),
        within_high=float(w_high),
    )


def literal_criterion(sketch_nD: FloatArray, labels_n: IntArray, k: int) -> bool:
    """The printed criterion: divergence inside the clusters at most 1 / sqrt(K) of the whole."""
    kept = labels_n >= 0
    points, labels = sketch_nD[kept], labels_n[kept]
    if len(points) < 2:
        return False
    inside = np.concatenate(
        [points[labels == c] - points[labels == c].mean(axis=0) for c in np.unique(labels)]
    )
    whole = points - points.mean(axis=0)
    return bool(np.sqrt((inside**2).sum()) <= np.sqrt((whole**2).sum() / k))
