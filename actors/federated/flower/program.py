"""A Flower ``NumPyClient`` on our engine: your own client code, our rounds, workers and recovery.

    spec = numpy_client_spec("my_package.clients:client_fn", num_partitions=100)
    job = FederatedJob(FedAvg(spec, LocalConfig(), 10), population)

``client_fn`` is Flower's: it takes a ``Context`` whose ``node_config["partition-id"]`` names the
client, and returns a client. Its code runs once per client and round on a worker, so it costs what
it costs; for models in PyTorch the batched engine is ten to a hundred times quicker.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict

from raysys.errors import ConfigError
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.program import Arrays, Fitted, FromProgram


class NumPyClientProgram:
    """Calls ``fit`` of the client that ``client_fn`` makes."""

    def __init__(self, client_fn: Callable[[Any], Any], num_partitions: int) -> None:
        self._client_fn = client_fn
        self._partitions = num_partitions

    def client(self, number: int) -> Any:
        """The ``NumPyClient`` of one partition, out of its wrapper where it has one."""
        context = Context(
            run_id=1,
            node_id=number + 1,
            node_config={"partition-id": number, "num-partitions": self._partitions},
            state=RecordDict(),
            run_config={},
        )
        made = self._client_fn(context)
        return getattr(made, "numpy_client", made)

    def fit(self, client: int, weights: Arrays, round_id: int) -> Fitted:
        """One local training."""
        arrays, n_samples, metrics = self.client(client).fit(
            weights, {"server-round": round_id + 1, "server_round": round_id + 1}
        )
        loss = float(metrics.get("train_loss", metrics.get("loss", 0.0)))
        return Fitted(arrays, int(n_samples), loss, loss)


def numpy_client_program(client_fn: str, num_partitions: int) -> NumPyClientProgram:
    """Make the program from an importable ``"package.module:client_fn"``.

    Raises:
        ConfigError: it cannot be imported.
    """
    name, _, attribute = client_fn.partition(":")
    try:
        maker = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("client_fn", client_fn, "package.module:function", str(error)) from error
    return NumPyClientProgram(maker, num_partitions)


def numpy_client_spec(client_fn: str, num_partitions: int) -> ModelSpec:
    """Model spec of a client function: shapes come from the first client's parameters."""
    program = numpy_client_program(client_fn, num_partitions)
    shapes = tuple(tuple(np.shape(part)) for part in program.client(0).get_parameters({}))
    return ModelSpec(
        architecture=FromProgram(
            factory=f"{__name__}:numpy_client_program",
            shapes=shapes,
            arguments=(("client_fn", client_fn), ("num_partitions", num_partitions)),
        )
    )
