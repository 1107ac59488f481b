"""What an item of the knapsack is worth under each objective.

Andes (arXiv 2404.16283), alternative objectives: the mean QoE, the worst QoE, or the number of
requests with perfect QoE. The tail target is ours.

Shapes: N requests, W batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raysys.serving.andes.gain import outlook
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.snapshot import FloatArray, Snapshot

ObjectiveValue = Callable[[PlannerConfig, Snapshot, FloatArray, FloatArray], FloatArray]


def _mean(_: PlannerConfig, __: Snapshot, ___: FloatArray, gain_WN: FloatArray) -> FloatArray:
    return gain_WN


def _maxmin(_: PlannerConfig, s: Snapshot, wait_N: FloatArray, gain_WN: FloatArray) -> FloatArray:
    """``max(Q_min - Qwait, 0)`` with Q_min the worst current QoE; only where service helps."""
    lowest = float(outlook(s, 0.0).wait.min())
    result: FloatArray = np.where(gain_WN > 0.0, np.maximum(lowest - wait_N, 0.0), 0.0)
    return result


def _perfect(_: PlannerConfig, s: Snapshot, wait_N: FloatArray, gain_WN: FloatArray) -> FloatArray:
    """One for each request that is perfect now and stays so only if it is served."""
    sharp = 1.0 - 1e-6
    now_N = outlook(s, 0.0).wait >= sharp
    result: FloatArray = (now_N & (wait_N < sharp) & (wait_N + gain_WN >= sharp)).astype(np.float64)
    return result


def _tail(
    config: PlannerConfig, _: Snapshot, wait_N: FloatArray, gain_WN: FloatArray
) -> FloatArray:
    """Distance below the target, where service helps."""
    short = np.maximum(0.0, config.tail_target - wait_N)
    result: FloatArray = np.where(gain_WN > 0.0, short, 0.0)
    return result


OBJECTIVE_VALUES: dict[str, ObjectiveValue] = {
    "mean": _mean,
    "maxmin": _maxmin,
    "perfect": _perfect,
    "tail": _tail,
}
