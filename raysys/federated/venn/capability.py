"""Speed classes of devices, the fixed grid on which jobs learn their tiers.

A class is a step of the expected time for a nominal task relative to the population's mean, on a
logarithmic grid: fine enough that quantiles of classes give tiers of nearly equal size, and the
same for all jobs, so that one plan serves them all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLASSES = 12
UNKNOWN = CLASSES  # a device that did not say: only unrestricted rounds take it
WORK_S, COMM_S = 30.0, 10.0  # nominal task: computing, and one transfer
_EDGES = np.geomspace(0.25, 8.0, CLASSES - 1)


def capability_classes(
    compute: npt.NDArray[np.floating], bandwidth: npt.NDArray[np.floating]
) -> npt.NDArray[np.int64]:
    """Class of every device in [0, 12), 0 the fastest.

    Args:
        compute: time per sample relative to the population's mean, N values > 0.
        bandwidth: bandwidth relative to the population's mean, N values > 0.
    """
    task_s = WORK_S * compute.astype(np.float64) + 2 * COMM_S / bandwidth.astype(np.float64)
    relative = task_s / (WORK_S + 2 * COMM_S)
    return np.searchsorted(_EDGES, relative, side="right").astype(np.int64)
