"""Fed-ensemble with asynchronous clients: FedBuff's clock and discounts, K models.

One stream of clients is in flight, as for one model; a client trains the model that its own
schedule names, from the version that was current when it started. At every full buffer each model
takes a server step with its own answers, an answer that is ``s`` versions old counting
``1 / sqrt(1 + s)``, divided by their number. With K = 1 this is FedBuff to the bit. The paper has
synchronous rounds only; this composition is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.devices import CostOf, DeviceConfig, Outcome
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.fedbuff import KEEP_STALENESS, AsyncConfig, BufferedArrivals, discounted
from raysys.federated.core.messages import IntArray
from raysys.federated.core.model import FlatWeights
from raysys.federated.core.population import Population
from raysys.federated.core.strategy import (
    Assignment,
    Demand,
    JobFacts,
    RoundReport,
    StateArrays,
)
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble


class BufferedEnsemble(FedEnsemble):
    """K models, one asynchronous stream of clients.

    Model ids below K are the members as they are now; ``K * (v + 1) + m`` is member m of version v,
    from which some clients still train.

    Args:
        config: the ensemble. buffer: answers to a server step, over all models.
        make_inner: builds one model line with uniform weights; called K times.
        asynchronous: the clock.

    Raises:
        ConfigError: a warm start or a shared trunk: a client in flight would return to models that
            are no more.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        buffer: int,
        make_inner: Callable[[], FedAvg],
        asynchronous: AsyncConfig,
    ) -> None:
        for name, value, allowed in (
            ("warm_rounds", config.warm_rounds, 0),
            ("share", config.share, "none"),
        ):
            if value != allowed:
                raise ConfigError(
                    f"ensemble.{name}", value, f"{allowed!r} with asynchronous rounds"
                )
        super().__init__(config, buffer, make_inner)
        self._arrivals = BufferedArrivals(asynchronous, buffer)
        self._history: dict[int, list[FlatWeights]] = {}
        self._answers = np.zeros(config.k, dtype=np.int64)
        self.staleness: list[int] = []

    def start(self, facts: JobFacts) -> None:
        """The first versions; nobody flies yet."""
        super().start(facts)
        self._arrivals.check(facts.population)
        self._history = {0: self._now()}

    def select(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        round_id: int,
    ) -> Outcome:
        """Who fills the next buffer; repeats exactly until the round closes."""
        return self._arrivals.select(population, devices, cost_of, seed, round_id)

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """One assignment per version and member that somebody started from."""
        versions = self._arrivals.versions_of(clients)
        models = np.zeros_like(versions)
        for version in np.unique(versions).tolist():
            then = versions == version
            models[then] = self.schedule.next_models(clients[then], version)
        self._placed.append((clients, models))
        self._answers += np.bincount(models, minlength=self.config.k)
        self._counts = self._answers
        keys = self.config.k * (versions + 1) + models
        return [
            Assignment(
                clients=clients[keys == key],
                model_id=key,
                version=key // self.config.k - 1,
                local=self.local_config(key // self.config.k - 1),
            )
            for key in np.unique(keys).tolist()
        ]

    def weights(self, model_id: int) -> FlatWeights:
        """Weights of a member as they are, or of a version that somebody still trains from."""
        version, member = divmod(model_id, self.config.k)
        return self._history[version - 1][member] if version else super().weights(member)

    def demand(self, round_id: int) -> list[Demand]:
        """One stream; an aborted attempt leaves nothing."""
        self._answers = np.zeros(self.config.k, dtype=np.int64)
        demands = super().demand(round_id)
        self._history[round_id] = self._now()  # a broken member was just replaced
        return demands

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Add the sum of one version's clients to their member's, discounted by its age."""
        version, member = divmod(model_id, self.config.k)
        age = round_id - (version - 1)
        part = discounted(total.delta, age)
        so_far = self._folded.get(member)
        self._folded[member] = ModelSum(
            part if so_far is None else so_far.delta + part, float(self._answers[member])
        )
        self.staleness.append(age)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server steps; versions that nobody started from any more are forgotten."""
        super().close(round_id, report)
        needed = self._arrivals.commit()
        self._history = {v: w for v, w in self._history.items() if v in needed}
        self._history[round_id + 1] = self._now()
        self.staleness = self.staleness[-KEEP_STALENESS:]

    def state(self) -> StateArrays:
        """The ensemble's state, the clients in flight, and the versions that they started from."""
        return {
            **super().state(),
            **self._arrivals.state(),
            "async.versions": np.array(list(self._history), dtype=np.int64),
            "async.weights": np.stack([np.stack(row) for row in self._history.values()]),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        self._arrivals.load(state)
        super().load(state)
        versions = state["async.versions"].tolist()
        stacked = np.array(state["async.weights"], dtype=np.float32)
        self._history = {int(v): list(rows) for v, rows in zip(versions, stacked)}

    @property
    def _may_balance(self) -> bool:
        """A client has its model long before it arrives."""
        return False

    def _now(self) -> list[FlatWeights]:
        return [line.weights(0) for line in self.lines]
