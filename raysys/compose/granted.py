"""A federated job whose devices an outside scheduler has granted: learning without a clock."""

from __future__ import annotations

from typing import cast

import numpy as np

from raysys.federated.core.devices import CostOf, DeviceConfig, Outcome
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.messages import IntArray, ScreenConfig
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round
from raysys.federated.core.strategy import RoundReport, Strategy, WrappedStrategy
from raysys.federated.core.training import Samples


class _Granted(WrappedStrategy):
    """The wrapped strategy, save that it is told who takes part."""

    clients: IntArray = np.empty(0, dtype=np.int64)

    def select(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        round_id: int,
    ) -> Outcome:
        """Exactly the granted clients."""
        none = np.empty(0, dtype=np.int64)
        return Outcome(self.clients, none, none, 0.0, None)


class GrantedJob:
    """Trains whatever clients it is given, a round at a time.

    Args:
        strategy: any strategy with late binding; the job starts it.
        min_fraction: share of the strategy's demand below which a round counts as lost.
    """

    def __init__(
        self,
        strategy: Strategy,
        population: Population,
        samples: Samples,
        seed: int,
        min_fraction: float = 0.3,
    ) -> None:
        self.strategy = strategy
        self.samples = samples
        self._granted = _Granted(strategy)
        screen = ScreenConfig(min_fraction=min_fraction)
        self._job = FederatedJob(cast(Strategy, self._granted), population, seed, screen=screen)

    @property
    def population(self) -> Population:
        return self._job.population

    def round(self, devices: IntArray) -> RoundReport:
        """One round with the clients that live on these devices (device modulo clients).

        Raises:
            InfeasibleError: too few of their updates can be used.
        """
        self._granted.clients = np.unique(devices % self.population.n_clients)
        return run_round(self._job, self.samples)
