"""Plain federated averaging of one model on the devices that can run it."""

from __future__ import annotations

from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.strategy import Demand


class CappedFedAvg(FedAvg):
    """FedAvg that asks for capable devices only.

    Args:
        min_mac_s: slowest device that takes part; 0 asks nobody's capacity (an upper bound).
    """

    def __init__(
        self, spec: ModelSpec, local: LocalConfig, clients_per_round: int, min_mac_s: float
    ) -> None:
        super().__init__(spec, local, clients_per_round)
        self.needed_mac_s = min_mac_s

    def demand(self, round_id: int) -> list[Demand]:
        """One stream of devices that are fast enough."""
        return [Demand(clients=self.clients_per_round, min_mac_s=self.needed_mac_s)]
