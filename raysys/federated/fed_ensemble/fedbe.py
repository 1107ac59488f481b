"""FedBE (Chen and Chao 2021): sample models around the clients' mean, ensemble, distil. A baseline.

Every round the server takes the client models, adds draws of a Gaussian with their mean and
diagonal variance, and lets the mixture label unlabelled server data; the mean model learns those
labels and goes on as the global model (algorithm 1 there, without the SWA schedule of the student's
learning rate). It needs every client model and data on the server, which Fed-ensemble does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from raysys.federated.core.evaluation import outputs
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.strategy import JobFacts, RoundReport
from raysys.federated.fed_ensemble.baselines import fedbe_members
from raysys.federated.fed_ensemble.distillation import DistillConfig, distil
from raysys.federated.fed_ensemble.prediction import predict


class FedBe(FedAvg):
    """FedAvg whose rounds end with Bayesian model averaging on the server.

    Args:
        server_inputs: unlabelled samples on the server, or None for the ensemble alone.
        draws: Gaussian models besides the mean and the clients.
        every: rounds between distillations, which cost far more than aggregation.
    """

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        server_inputs: npt.NDArray[np.float32] | None = None,
        draws: int = 10,
        every: int = 1,
        distillation: DistillConfig | None = None,
    ) -> None:
        super().__init__(spec, local, clients_per_round)
        self._feedback = FeedbackSpec(weighting="samples", update_group=1)
        self._inputs = server_inputs
        self._draws = draws
        self._every = every
        self._distillation = distillation or DistillConfig(epochs=2, lr=0.01)
        self._seed = 0
        self._members: npt.NDArray[np.float32] | None = None

    def start(self, facts: JobFacts) -> None:
        """Remember the seed of the draws."""
        super().start(facts)
        self._seed = facts.seed

    def close(self, round_id: int, report: RoundReport) -> None:
        """Average, sample the ensemble, and distil it where there is data."""
        table, start = report.table, self.weights(0)
        super().close(round_id, report)
        if table.updates is None or table.update_weight is None:
            return
        kept = table.update_weight > 0
        if not kept.any():
            return
        clients = start + table.updates[kept]
        counts = table.update_weight[kept].astype(np.int64)
        self._members = fedbe_members(clients, counts, self._draws, self._seed + round_id)
        if self._inputs is not None and (round_id + 1) % self._every == 0:
            x = torch.from_numpy(self._inputs)
            logits = np.stack([outputs(self.spec, row, x).numpy() for row in self._members])
            soft = predict(logits).probabilities
            self._values = distil(
                self.spec, self.weights(0), self._inputs, soft, self._distillation, round_id
            )

    def stacked(self) -> npt.NDArray[np.float32]:
        """The ensemble of the last round: mean, clients, draws, float32 [M, P]."""
        return self.weights(0)[None] if self._members is None else self._members
