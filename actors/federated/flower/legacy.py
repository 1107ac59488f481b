"""Strategies of Flower's older interface (``flwr.server.strategy``) on our engine, unchanged.

    server = EngineServer(clients, flwr.server.strategy.FedYogi(initial_parameters=...))
    history, seconds = server.fit(num_rounds=50, timeout=None)

This is Flower's own ``Server`` with its own history; only how a round's instructions are carried
out differs: together, by :class:`~actors.federated.flower.clients.EngineClients`, and not in a
thread and a message each. Clients are numbered from 0, and their number is their ``cid``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common import Status as Answer
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import Server

from actors.federated.flower.clients import EngineClients, Update, join_arrays, split_flat
from raysys.errors import CapabilityError, ConfigError
from raysys.federated.core.model import FlatWeights

OK = Answer(code=Code.OK, message="")


class EngineProxy(ClientProxy):  # type: ignore[misc]
    """One of our clients as strategies know it: a name, and the first weights if asked."""

    def __init__(self, number: int, clients: EngineClients) -> None:
        super().__init__(str(number))
        self.number = number
        self._clients = clients

    def get_parameters(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        """Freshly initialised weights, for a strategy that brings none."""
        arrays = split_flat(self._clients.initial(), self._clients.layout.shapes)
        return GetParametersRes(status=OK, parameters=ndarrays_to_parameters(arrays))

    def get_properties(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        """Not answered.

        Raises:
            CapabilityError: always.
        """
        raise _alone("get_properties")

    def fit(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        """Not answered one by one; :class:`EngineServer` answers for a whole round.

        Raises:
            CapabilityError: always.
        """
        raise _alone("fit")

    def evaluate(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        """As :meth:`fit`.

        Raises:
            CapabilityError: always.
        """
        raise _alone("evaluate")

    def reconnect(self, ins: Any, timeout: Any, group_id: Any) -> Any:
        """As :meth:`fit`.

        Raises:
            CapabilityError: always.
        """
        raise _alone("reconnect")


class EngineServer(Server):  # type: ignore[misc]
    """Flower's server whose clients are ours.

    Args:
        clients: the clients, and how they train. strategy: a ``flwr.server.strategy.Strategy``.
    """

    def __init__(self, clients: EngineClients, strategy: Any) -> None:
        manager = SimpleClientManager()
        for number in range(clients.population.n_clients):
            manager.register(EngineProxy(number, clients))
        super().__init__(client_manager=manager, strategy=strategy)
        self._clients = clients
        self._shapes = clients.layout.shapes

    def weights(self) -> FlatWeights:
        """Current weights, float32 [P]."""
        return join_arrays(parameters_to_ndarrays(self.parameters), self._shapes)

    def fit_round(self, server_round: int, timeout: float | None) -> Any:
        """One round of training, all clients together.

        Raises:
            ConfigError: weights of another model, or a configuration that clients do not know.
        """
        asked = self.strategy.configure_fit(
            server_round=server_round,
            parameters=self.parameters,
            client_manager=self.client_manager(),
        )
        if not asked:
            return None
        results: list[Any] = []
        failures: list[Any] = []
        for (proxy, _), update in zip(asked, self._train(server_round, asked)):
            if update.weights is None:
                name = update.status.name.lower()
                failures.append(RuntimeError(f"client {proxy.cid}: update dropped, {name}"))
                continue
            arrays = split_flat(update.weights, self._shapes)
            answer = FitRes(
                status=OK,
                parameters=ndarrays_to_parameters(arrays),
                num_examples=update.n_samples,
                metrics={"train_loss": update.loss},
            )
            results.append((proxy, answer))
        found, metrics = self.strategy.aggregate_fit(server_round, results, failures)
        return found, metrics, (results, failures)

    def evaluate_round(self, server_round: int, timeout: float | None) -> Any:
        """Score the weights that the strategy sends on its clients' own samples."""
        asked = self.strategy.configure_evaluate(
            server_round=server_round,
            parameters=self.parameters,
            client_manager=self.client_manager(),
        )
        if not asked:
            return None
        sent: dict[int, FlatWeights] = {}
        results: list[Any] = []
        failures: list[Any] = []
        for proxy, ins in asked:
            if id(ins.parameters) not in sent:
                sent[id(ins.parameters)] = self._flat(ins.parameters)
            score = self._clients.score(sent[id(ins.parameters)], proxy.number)
            if score is None:
                failures.append(RuntimeError(f"client {proxy.cid}: no samples"))
                continue
            metrics = {"accuracy": score.accuracy} if np.isfinite(score.accuracy) else {}
            answer = EvaluateRes(status=OK, loss=score.loss, num_examples=score.n, metrics=metrics)
            results.append((proxy, answer))
        loss, totals = self.strategy.aggregate_evaluate(server_round, results, failures)
        return loss, totals, (results, failures)

    def _train(self, server_round: int, asked: list[Any]) -> list[Update]:
        # A strategy mostly sends one set of weights to all; some send several.
        sent = {id(ins.parameters): ins.parameters for _, ins in asked}
        row_of = {name: row for row, name in enumerate(sent)}
        return self._clients.train(
            np.stack([self._flat(parameters) for parameters in sent.values()]),
            np.array([row_of[id(ins.parameters)] for _, ins in asked], dtype=np.int64),
            np.array([proxy.number for proxy, _ in asked], dtype=np.int64),
            server_round,
            [ins.config for _, ins in asked],
        )

    def _flat(self, parameters: Any) -> FlatWeights:
        if parameters.tensor_type != "numpy.ndarray":
            raise ConfigError("parameters.tensor_type", parameters.tensor_type, "numpy.ndarray")
        return join_arrays(parameters_to_ndarrays(parameters), self._shapes)


def _alone(method: str) -> CapabilityError:
    return CapabilityError(
        f"ClientProxy.{method}", "our clients answer a round at a time",
        "Let EngineServer run the strategy",
    )  # fmt: skip
