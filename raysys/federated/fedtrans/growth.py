"""When a model has converged, which cells are under strain, and what to do about them.

Section 3 of the paper: degree of convergence (3.1), activeness (3.2), compound scaling (3.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysys.federated.core.model import FlatWeights
from raysys.federated.core.randomness import Purpose, torch_seed
from raysys.federated.fedtrans.config import GrowthConfig
from raysys.federated.fedtrans.lineage import Model
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.transform import Step, apply_step, can_deepen, can_widen

FloatArray = npt.NDArray[np.float64]
SMALLEST_NORM = 1e-8


def degree_of_convergence(losses: Sequence[float], config: GrowthConfig) -> float | None:
    """Mean loss decrease per round over the last ``gamma`` slopes of length ``delta``.

    Args:
        losses: mean training loss of each round since the model was born.

    Returns:
        Loss units per round (negative where the loss rises), or None with too few rounds.
    """
    if len(losses) < config.delta + config.gamma:
        return None
    smooth = smoothed(losses, config.smooth)
    ends = smooth[-config.gamma :]
    starts = smooth[-config.gamma - config.delta : -config.delta]
    return float((starts - ends).mean() / config.delta)


def smoothed(losses: Sequence[float], window: int) -> FloatArray:
    """Trailing mean over up to ``window`` rounds, float64."""
    total = np.concatenate(([0.0], np.cumsum(np.asarray(losses, dtype=np.float64))))
    end = np.arange(1, len(losses) + 1)
    start = np.maximum(0, end - window)
    means: FloatArray = (total[end] - total[start]) / (end - start)
    return means


def threshold(losses: Sequence[float], config: GrowthConfig) -> float:
    """The slope at or below which the model counts as converged."""
    if config.beta_relative is None or not len(losses):
        return config.beta
    return config.beta_relative * abs(float(smoothed(losses, config.smooth)[0]))


def activeness(net: CellNet, gradient: FloatArray, values: FlatWeights) -> FloatArray:
    """``||gradient|| / ||weights||`` of each cell, float64 [cells].

    Args:
        gradient: the round's aggregated update over learning rate and steps, float64 [P].
    """
    norms = [
        float(np.linalg.norm(gradient[part]))
        / max(SMALLEST_NORM, float(np.linalg.norm(values[part].astype(np.float64))))
        for part in net.slices()[:-1]
    ]
    return np.array(norms)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Transformation:
    """A decision to grow, and why: what ``explain_transform`` reports.

    Args:
        steps: from the last cell to the first; empty if nothing fits any more.
        activeness: of each cell. dropped: cells left out because the result would not fit.
        macs_before, macs_after: of one sample.
    """

    steps: tuple[Step, ...]
    activeness: tuple[float, ...]
    dropped: tuple[int, ...]
    macs_before: int
    macs_after: int


def plan_transformation(
    model: Model,
    active: FloatArray,
    config: GrowthConfig,
    largest_macs: float,
    seed: int,
    child: int,
) -> Transformation:
    """Choose cells and operations so that the child fits the largest device.

    Widen unless the cell's last transformation was a widening, then deepen. Cells are dropped from
    the least active upwards until the child fits.

    Args:
        active: mean activeness of each cell. child: index that the new model will have.
    """
    chosen = _select(model, active, config, seed, child)
    dropped: list[int] = []
    before = model.net.macs()
    while chosen:
        steps = _steps(model, chosen, config, seed, child)
        after = _after(model.net, steps)
        if after <= largest_macs:
            return Transformation(
                steps=steps, activeness=tuple(active.tolist()), dropped=tuple(dropped),
                macs_before=before, macs_after=after,
            )  # fmt: skip
        weakest = min(chosen, key=lambda cell: float(active[cell]))
        chosen.remove(weakest)
        dropped.append(weakest)
    return Transformation(
        steps=(), activeness=tuple(active.tolist()), dropped=tuple(dropped),
        macs_before=before, macs_after=before,
    )  # fmt: skip


def _select(
    model: Model, active: FloatArray, config: GrowthConfig, seed: int, child: int
) -> list[int]:
    able = [
        cell
        for cell in range(len(model.net.cells))
        if can_widen(model.net, cell) or can_deepen(model.net, cell)
    ]
    if not able:
        return []
    most = max(float(active[cell]) for cell in able)
    found = [cell for cell in able if float(active[cell]) > config.alpha * most]
    found = found or [max(able, key=lambda cell: float(active[cell]))]
    if config.select == "random":
        rng = np.random.default_rng(torch_seed(seed, Purpose.SPLIT, child))
        found = [int(cell) for cell in rng.choice(able, size=len(found), replace=False)]
    return sorted(found)


def _steps(
    model: Model, chosen: Sequence[int], config: GrowthConfig, seed: int, child: int
) -> tuple[Step, ...]:
    steps = []
    for cell in sorted(chosen, reverse=True):
        widen = can_widen(model.net, cell) and (
            model.last_op[cell] != "widen" or not can_deepen(model.net, cell)
        )
        steps.append(
            Step(
                op="widen" if widen else "deepen",
                cell=cell,
                factor=config.widen,
                seed=torch_seed(seed, Purpose.SPLIT, child * 1000 + cell) % 2**31,
                split=config.split,  # type: ignore[arg-type]
            )
        )
    return tuple(steps)


def _after(net: CellNet, steps: Sequence[Step]) -> int:
    for step in steps:
        net = apply_step(net, step)
    return net.macs()
