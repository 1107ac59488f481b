"""SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II): control variates against drift.

Every client keeps a control variate c_k, the server their mean c; local steps use the gradient plus
c - c_k. Costs a second model of traffic each way, and P floats for every client that ever took
part; that store is here on the server, so a simulated client stays stateless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.server import ServerOptimizer
from raysys.federated.core.strategy import JobFacts, RoundReport, StateArrays


class Scaffold(FedAvg):
    """FedAvg with control variates.

    The paper averages clients uniformly, and so do we. Momentum is refused: option II reads the
    mean gradient off the distance walked, which momentum would falsify.
    """

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        server: ServerOptimizer | None = None,
    ) -> None:
        if local.momentum:
            raise ConfigError(
                "local.momentum", local.momentum, "0 with SCAFFOLD", "Use FedAvgM instead"
            )
        super().__init__(spec, local, clients_per_round, server)
        self._feedback = FeedbackSpec(weighting="uniform", controls=True)
        self._population = 0
        self._mean_control: npt.NDArray[np.float64] | None = None
        self._row_of: dict[int, int] = {}
        self._rows = np.zeros((0, 0), dtype=np.float32)

    def start(self, facts: JobFacts) -> None:
        """Control variates start at zero."""
        super().start(facts)
        self._population = facts.population.n_clients
        if self._mean_control is None:
            self._mean_control = np.zeros(len(self.weights(0)))
            self._rows = np.zeros((0, len(self.weights(0))), dtype=np.float32)

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """c - c_k of each client, float32 [k, P]."""
        assert self._mean_control is not None
        drift = np.repeat(self._mean_control[None].astype(np.float32), len(clients), axis=0)
        for place, client in enumerate(clients):
            row = self._row_of.get(int(client))
            if row is not None:
                drift[place] -= self._rows[row]
        return drift

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step, then c_k += -c - (w_k - w) / (steps lr) and c += mean change * |S| / N."""
        super().close(round_id, report)
        table = report.table
        assert self._mean_control is not None
        assert table.controls is not None
        kept = np.flatnonzero(table.ok)
        change = table.controls[kept] - self._mean_control.astype(np.float32)
        for place, client in zip(range(len(kept)), table.clients[kept]):
            row = self._row(int(client))  # may replace the store, so it comes first
            self._rows[row] += change[place]
        self._mean_control = self._mean_control + change.sum(axis=0, dtype=np.float64) / (
            self._population
        )

    def state(self) -> StateArrays:
        """FedAvg's state, the mean control variate, and those of the clients seen."""
        assert self._mean_control is not None
        used = len(self._row_of)
        return {
            **super().state(),
            "scaffold.mean": self._mean_control,
            "scaffold.clients": np.array(list(self._row_of), dtype=np.int64),
            "scaffold.rows": self._rows[:used],
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore weights and control variates."""
        if "scaffold.mean" not in state:
            raise ConfigError("state", sorted(state), "a state of SCAFFOLD")
        super().load(state)
        self._mean_control = np.array(state["scaffold.mean"], dtype=np.float64)
        self._row_of = {int(c): row for row, c in enumerate(state["scaffold.clients"])}
        self._rows = np.array(state["scaffold.rows"], dtype=np.float32)

    def _row(self, client: int) -> int:
        """Row of a client's control variate, made on first use; the store grows by doubling."""
        row = self._row_of.setdefault(client, len(self._row_of))
        if row >= len(self._rows):
            grown = np.zeros((max(16, 2 * len(self._rows)), self._rows.shape[1]), dtype=np.float32)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        return row
