"""Pace steering: when should a device that got no task come back?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MIN_RETRY_S = 60.0
MAX_RETRY_S = 900.0
JITTER = 0.2


def retry_after_s(
    demand: float, rate: float, low_s: float = MIN_RETRY_S, high_s: float = MAX_RETRY_S
) -> float:
    """Seconds until a refused device should check in again.

    Waiting demand over supply is the time it takes to serve everybody: with much demand devices
    come back soon, with none they stay away.

    Args:
        demand: devices still wanted by all open rounds; rate: devices per second.
    """
    if demand <= 0:
        return high_s
    horizon_s = demand / max(rate, 1e-9)
    return float(np.clip(high_s - horizon_s, low_s, high_s))


def jittered(base_s: float, count: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """``count`` delays within 20 % of ``base_s``, so that refused devices do not return at once."""
    return (base_s * generator.uniform(1 - JITTER, 1 + JITTER, count)).astype(np.float32)
