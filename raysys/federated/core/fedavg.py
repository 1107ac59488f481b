"""One model line: federated averaging with any server optimiser, FedProx and q-FedAvg.

FedAvg: McMahan et al. 2017. FedAvgM, FedAdam, FedYogi: Reddi et al. 2021. FedProx (Li et al. 2020)
is a client-side term, so it is ``LocalConfig.prox_mu``. q-FedAvg: Li et al. 2020, "Fair resource
allocation in federated learning", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec, Weights, initial_weights
from raysys.federated.core.server import Averaging, ServerOptimizer
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays


class FedAvg:
    """One global model.

    Args:
        spec: the model. local: local training of every client.
        clients_per_round: answers wanted in a round.
        server: how the mean update moves the model.
        weighting: "samples" or "uniform".
        start_weights: where to start; None draws them from the job's seed.

    Raises:
        ConfigError: no clients per round, or weights of another model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        server: ServerOptimizer | None = None,
        weighting: str = "samples",
        start_weights: Weights | None = None,
    ) -> None:
        if clients_per_round < 1:
            raise ConfigError("clients_per_round", clients_per_round, "at least 1")
        if start_weights is not None:
            start_weights.check_spec(spec)
        self.spec = spec
        self.local = local
        self.clients_per_round = clients_per_round
        self.server: ServerOptimizer = server or Averaging()
        self._feedback = FeedbackSpec(weighting=weighting)
        self._values = None if start_weights is None else start_weights.values
        self._version = 0
        self._folded: ModelSum | None = None

    def model_spec(self, model_id: int) -> ModelSpec:
        """The one spec."""
        return self.spec

    def start(self, facts: JobFacts) -> None:
        """Draw the initial weights, unless some were given or loaded."""
        if self.clients_per_round > facts.population.n_clients:
            raise ConfigError(
                "clients_per_round",
                self.clients_per_round,
                f"at most the population of {facts.population.n_clients}",
            )
        if self._values is None:
            self._values = initial_weights(self.spec, facts.seed, facts.member).values

    def demand(self, round_id: int) -> list[Demand]:
        """One stream; any device is fine."""
        return [Demand(clients=self.clients_per_round)]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Everybody trains the one model."""
        local = self.local.at_round(round_id)
        return [Assignment(clients=clients, model_id=0, version=self._version, local=local)]

    def local_config(self, round_id: int) -> LocalConfig:
        """The one configuration, at the round's learning rate."""
        return self.local.at_round(round_id)

    def weights(self, model_id: int) -> FlatWeights:
        """Current global weights, float32 [P]."""
        if self._values is None:
            raise ConfigError("strategy", "not started", "start() before use")
        return self._values

    def replace(self, values: FlatWeights) -> None:
        """Put other weights in place of the model's; the optimiser keeps its moments."""
        Weights(values, self.spec.spec_id).check_spec(self.spec)
        self._values = values

    def reset(self, values: FlatWeights) -> None:
        """Put other weights in place of the model's; the optimiser starts anew."""
        self.replace(values)
        self.server.load({})

    def feedback_spec(self) -> FeedbackSpec:
        """Only the weighting."""
        return self._feedback

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections."""
        return None

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Keep the round's sums until it closes."""
        self._folded = total

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step; a round without updates leaves the model as it is."""
        folded, self._folded = self._folded, None
        if folded is not None and folded.weight > 0:
            self._values = self.server.step(self.weights(0), self._mean(folded))
        self._version += 1

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """The one model predicts for everybody."""
        return [(0, 1.0)]

    def state(self) -> StateArrays:
        """Weights, version and the optimiser's moments."""
        moments = {f"server.{name}": value for name, value in self.server.state().items()}
        version = np.array([self._version], dtype=np.int64)
        return {"weights": self.weights(0), "version": version, **moments}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore weights, version and moments."""
        if "weights" not in state or "version" not in state:
            raise ConfigError("state", sorted(state), "a state of FedAvg")
        Weights(np.asarray(state["weights"]), self.spec.spec_id).check_spec(self.spec)
        self._values = np.array(state["weights"], dtype=np.float32)
        self._version = int(state["version"][0])
        inner = {n.removeprefix("server."): v for n, v in state.items() if n.startswith("server.")}
        self.server.load(inner)

    def _mean(self, folded: ModelSum) -> npt.NDArray[np.float64]:
        return folded.mean()


class QFedAvg(FedAvg):
    """q-FedAvg: clients with a higher loss count more; q 0 is uniform averaging with step 1.

    With L = 1 / lr and d_k = L delta_k the update is
    ``sum F_k^q d_k / sum(q F_k^(q-1) ||d_k||^2 + L F_k^q)``, where F_k is
    the loss of the received weights on all samples of client k.
    """

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        q: float = 1.0,
        server: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(spec, local, clients_per_round, server)
        self._feedback = FeedbackSpec(weighting="loss", q=q)

    def _mean(self, folded: ModelSum) -> npt.NDArray[np.float64]:
        lr = self.local.at_round(self._version).lr  # versions count the rounds
        return folded.delta / (lr * folded.scalar)
