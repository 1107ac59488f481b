"""SplitMix (Hong et al., ICLR 2022): many narrow base nets, as many on a device as it can run.

A client trains its base nets one after another in a round, on the same batches; the prediction is
their mean. Which nets a client takes rotates with the round, so that all are trained alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.ladder import KERNELS
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, Mlp, ModelSpec, initial_weights
from raysys.federated.core.randomness import Purpose, hashed
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays
from raysys.federated.fedtrans.rivals.submodels import mlp_macs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseNet(Mlp):
    """One base net; its number keeps it apart, since a client trains several in a round."""

    number: int = 0


# A base net is a perceptron like any other, and the batched kernel trains it.
KERNELS.setdefault(BaseNet, KERNELS[Mlp])


class SplitMix:
    """``m`` base nets, each 1/m of the full model's hidden widths.

    Args:
        sizes: the full model. m: number of base nets.
        sample_s: seconds a device may spend on a sample, as in FedTrans.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        local: LocalConfig,
        clients_per_round: int,
        m: int = 8,
        sample_s: float = 1.0,
    ) -> None:
        if m < 1:
            raise ConfigError("m", m, "at least 1")
        inner = tuple(max(1, round(width / m)) for width in sizes[1:-1])
        self.m = m
        self.local = local
        self.clients_per_round = clients_per_round
        self.base_sizes = (sizes[0], *inner, sizes[-1])
        self.base_macs = mlp_macs(self.base_sizes)
        self._specs = [
            ModelSpec(architecture=BaseNet(sizes=self.base_sizes, number=k)) for k in range(m)
        ]
        self._sample_s = sample_s
        self._seed = 0
        self._affordable: IntArray = np.empty(0, dtype=np.int64)
        self._values: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._folded: dict[int, ModelSum] = {}

    def start(self, facts: JobFacts) -> None:
        """Draw all base nets.

        Raises:
            InfeasibleError: too few devices can run one base net.
        """
        n = facts.population.n_clients
        rates = facts.population.rate_mac_s
        budget = np.full(n, np.inf) if rates is None else rates * self._sample_s
        self._affordable = np.minimum(budget // self.base_macs, self.m).astype(np.int64)
        able = int((self._affordable > 0).sum())
        if able < self.clients_per_round:
            raise InfeasibleError(
                f"{self.clients_per_round} clients a round",
                f"only {able} of {n} devices can run one base net",
                "Take more, narrower base nets",
            )
        self._seed = facts.seed
        plain = ModelSpec(architecture=Mlp(sizes=self.base_sizes))
        self._values = np.stack(
            [initial_weights(plain, facts.seed, member).values for member in range(self.m)]
        )

    def nets_of(self, client: int, round_id: int | None = None) -> IntArray:
        """Base nets of a client; rotating with the round in training, fixed in deployment."""
        first = int(hashed(self._seed, Purpose.SCHEDULE, client) % np.uint64(self.m))
        turn = 0 if round_id is None else round_id
        found: IntArray = (first + turn + np.arange(self._affordable[client])) % self.m
        return found

    def model_spec(self, model_id: int) -> ModelSpec:
        """Spec of a base net."""
        return self._specs[model_id]

    def demand(self, round_id: int) -> list[Demand]:
        """Devices that can run one base net."""
        needed = self.base_macs / self._sample_s
        return [Demand(clients=self.clients_per_round, min_mac_s=needed)]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """One assignment for each base net that somebody trains."""
        takers: dict[int, list[int]] = {}
        for client in clients.tolist():
            for net in self.nets_of(client, round_id).tolist():
                takers.setdefault(net, []).append(client)
        return [
            Assignment(
                clients=np.array(ids, dtype=np.int64), model_id=net, version=round_id,
                local=self.local,
            )
            for net, ids in sorted(takers.items())
        ]  # fmt: skip

    def local_config(self, round_id: int) -> LocalConfig:
        """The one configuration."""
        return self.local

    def weights(self, model_id: int) -> FlatWeights:
        """Weights of a base net."""
        values: FlatWeights = self._values[model_id]
        return values

    def feedback_spec(self) -> FeedbackSpec:
        """Nothing beyond the sums."""
        return FeedbackSpec()

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections."""
        return None

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Keep a net's sums until the round closes."""
        self._folded[model_id] = total

    def close(self, round_id: int, report: RoundReport) -> None:
        """Federated averaging of every base net."""
        for net, total in self._folded.items():
            self._values[net] = (self._values[net] + total.mean()).astype(np.float32)
        self._folded = {}

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """As many base nets as the client can run, with equal weights; at least one."""
        nets = self.nets_of(client).tolist() or [0]
        return [(net, 1.0 / len(nets)) for net in nets]

    def state(self) -> StateArrays:
        """Weights of all base nets."""
        return {"weights": self._values}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the state is of other base nets.
        """
        values = np.array(state.get("weights", ()), dtype=np.float32)
        if values.shape != self._values.shape:
            raise ConfigError("state", values.shape, f"weights of shape {self._values.shape}")
        self._values = values
