"""How well a client fitted the cohort that it tried, and what that says about other cohorts.

``dR = 1 - D / scale``: D is the distance of a client's update from the members' mean. The printed
scale, mean + std over all, makes a half-wrong cohort look normal; ours is median + 4 MAD over the
members alone. Only the farthest hundredth of the members lies beyond it, and all clients of other
groups do once the cohorts have trained apart for some fifteen rounds. (With 2 MAD a tenth of the
members is refused each round, and odd but right ones leave their cohort for ever.) The loss on the
received weights is free extra evidence.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from raysys.federated.auxo.affinity import HIGHEST, LOWEST
from raysys.federated.auxo.config import RuleConfig
from raysys.federated.auxo.tree import CohortTree

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
MIN_MEMBERS = 3
SPREAD = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class Feedback:
    """Of each participant: reward dR in [-10, 1], and D over the scale."""

    reward: FloatArray
    distance: FloatArray


def feedback(
    sketch_nD: FloatArray, loss_n: FloatArray, member_n: BoolArray, rules: RuleConfig
) -> Feedback:
    """Compare participants of one model with its members; with too few, with all participants."""
    reference = member_n if member_n.sum() >= MIN_MEMBERS else np.ones(len(sketch_nD), dtype=bool)
    centre = sketch_nD[reference].mean(axis=0)
    gap = np.linalg.norm(sketch_nD - centre, axis=1)
    printed = rules.scale == "mean_std"
    scale = float(gap.mean() + gap.std()) if printed else _robust(gap[reference])
    distance = gap / scale if scale > 1e-12 else np.zeros(len(gap))
    reward = 1 - distance
    if rules.loss_evidence and np.isfinite(loss_n[reference]).all():
        usual = _robust(loss_n[reference])
        if usual > 1e-12:
            reward = (reward + 1 - loss_n / usual) / 2
    clean = np.nan_to_num(reward, nan=LOWEST, posinf=HIGHEST, neginf=LOWEST)
    return Feedback(np.clip(clean, LOWEST, HIGHEST), distance)


def updated_rewards(
    before_nC: FloatArray,
    cohort: int,
    reward_n: FloatArray,
    tree: CohortTree,
    gamma: float,
    rules: RuleConfig,
) -> FloatArray:
    """New rewards of all cohorts after trying one.

    The cohort itself: ``R = gamma dR + (1 - gamma) R``. Another leaf q at d hops: the printed rule
    adds ``dR / (d + 1)`` undamped. With gamma 0.2 that moves untried cohorts five times further
    than the tried one: a failure keeps the client where it failed, and a member's successes lift
    all others above its own. Ours adds ``gamma min(dR, 0) / (d + 1)`` to cohorts that have not
    accepted the client, which keeps the order of the paper's worked example.
    """
    after = before_nC.copy()
    after[:, cohort] = gamma * reward_n + (1 - gamma) * before_nC[:, cohort]
    lent = reward_n if rules.propagation == "printed" else gamma * np.minimum(reward_n, 0)
    for other in tree.leaves:
        if other == cohort:
            continue
        # A cohort that has accepted the client is judged by its own evidence only.
        own = rules.propagation == "negative" and before_nC[:, other] > 0
        after[:, other] += np.where(own, 0.0, lent) / (tree.distance(cohort, other) + 1)
    return np.clip(after, LOWEST, HIGHEST)


def _robust(values: FloatArray) -> float:
    middle = float(np.median(values))
    return middle + SPREAD * float(np.median(np.abs(values - middle)))
