"""Coverage of a distribution by a coreset: AUC_pr and the p-r curve (CCS paper, section 4).

AUC_pr is the expected distance from a point to the nearest kept example, in the penultimate
features of the scoring model; lower is better. It shows poor coverage well, but does not rank CCS
above random: a diagnosis, not the objective.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.errors import ConfigError

Floats = NDArray[np.float32]
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """AUC_pr, and the radius that covers each share of the points."""

    auc_pr: float
    radius: dict[float, float]
    points: int


def nearest_distances(
    kept: Floats, targets: Floats, block_bytes: int = 64 << 20
) -> NDArray[np.float64]:
    """Euclidean distance from each target to the nearest kept row.

    Blocked products find the nearest row in float32 (features centred, squares clamped at 0); its
    distance is then recomputed in float64, since the expanded square loses digits.

    Args:
        kept: float32 (S, D). targets: float32 (T, D).
        block_bytes: bound on the S-block x T-block product matrix.

    Returns:
        float64, shape (T,).

    Raises:
        ConfigError: nothing kept, no targets, or widths that differ.
    """
    if len(kept) == 0 or len(targets) == 0 or kept.shape[1] != targets.shape[1]:
        raise ConfigError("features", (kept.shape, targets.shape), "(S, D) and (T, D), not empty")
    centre = kept.mean(0, dtype=np.float64).astype(np.float32)
    side = max(256, int((block_bytes / 4) ** 0.5))
    distances = np.empty(len(targets), np.float64)
    kept_t = torch.from_numpy(kept - centre)
    square = (kept_t * kept_t).sum(1)
    for start in range(0, len(targets), side):
        part = torch.from_numpy(targets[start : start + side] - centre)
        best = torch.full((len(part),), torch.inf)
        row = torch.zeros(len(part), dtype=torch.int64)
        for low in range(0, len(kept), side):
            # |b|^2 - 2ab: the target's own square does not change which row is nearest.
            block = kept_t[low : low + side]
            value, index = torch.addmm(
                square[None, low : low + side], part, block.t(), alpha=-2
            ).min(1)
            closer = value < best
            best = torch.where(closer, value, best)
            row = torch.where(closer, index + low, row)
        exact = (part.double() - kept_t[row].double()).norm(dim=1)
        distances[start : start + side] = exact.numpy()
    return distances


def summarise(distances: NDArray[np.float64]) -> Coverage:
    """AUC_pr and radii of nearest distances; parts of the targets may be concatenated first."""
    radius = {p: float(np.quantile(distances, p, method="higher")) for p in QUANTILES}
    return Coverage(float(distances.mean()), radius, len(distances))


def coverage(kept: Floats, targets: Floats, block_bytes: int = 64 << 20) -> Coverage:
    """Coverage of the targets by the kept rows (see :func:`nearest_distances`)."""
    return summarise(nearest_distances(kept, targets, block_bytes))
