"""Aggregation that a minority of broken or hostile clients cannot move far: median, trimmed mean.

Yin et al. 2018 ("Byzantine-robust distributed learning"): coordinate-wise median, and the mean
after cutting a share ``trim`` of the values at either end of each coordinate. Both need more than a
sum:
``group`` 1 asks for every single update, a larger group for means of that many clients, of which
the rule is then taken (Chen, Su and Xu 2017); that costs less traffic and tolerates fewer liars,
since one spoils its whole group. Every update counts alike, whatever samples a client claims.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from raysys.config import check_choice, check_range
from raysys.errors import ConfigError
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.server import ServerOptimizer
from raysys.federated.core.strategy import RoundReport

RULES = ("median", "trimmed_mean")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RobustConfig:
    """A robust rule.

    Args:
        rule: "median" or "trimmed_mean", per coordinate.
        trim: share cut at either end by the trimmed mean; it tolerates that share of liars.
        group: clients whose mean is one voice; 1 is exact and costs clients x parameters.
    """

    rule: str = "median"
    trim: float = 0.1
    group: int = 1

    def __post_init__(self) -> None:
        check_choice(self, "rule", RULES)
        check_range(self, "trim", 0, 0.5, high_open=True)
        check_range(self, "group", 1)


class RobustAvg(FedAvg):
    """FedAvg with a robust rule in place of the mean; any server optimiser on top."""

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        robust: RobustConfig,
        server: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(spec, local, clients_per_round, server, "uniform")
        self._robust = robust
        self._feedback = FeedbackSpec(weighting="uniform", update_group=robust.group)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step by the robust centre of the round's updates."""
        table = report.table
        if table.updates is None or table.update_weight is None:
            raise ConfigError("report.table.updates", None, "the updates that were asked for")
        voices = table.updates[table.update_weight > 0]
        if len(voices):
            self._values = self.server.step(self.weights(0), centre(voices, self._robust))
        self._folded = None
        self._version += 1


def centre(updates_UP: npt.NDArray[np.float32], config: RobustConfig) -> npt.NDArray[np.float64]:
    """Median or trimmed mean of updates, coordinate by coordinate, float64 [P].

    Raises:
        ConfigError: no updates.
    """
    n = len(updates_UP)
    if n == 0:
        raise ConfigError("updates", 0, "at least one")
    if config.rule == "median":
        median_P: npt.NDArray[np.float64] = np.median(updates_UP.astype(np.float64), axis=0)
        return median_P
    cut = int(config.trim * n)
    kept = np.sort(updates_UP.astype(np.float64), axis=0)[cut : n - cut]
    centre_P: npt.NDArray[np.float64] = kept.mean(axis=0)
    return centre_P
