"""A Flower ``Grid`` whose nodes are our clients: any message-based Flower strategy runs unchanged.

    grid = EngineGrid(EngineClients(data, population, spec, LocalConfig(lr=0.1)))
    strategy = flwr.serverapp.strategy.FedAdam(fraction_train=0.1)
    result = strategy.start(grid, grid.initial_arrays(), num_rounds=50)

Differences from Flower's simulation: clients are rows of an array instead of processes,
``ClientApp`` code does not run (for your own client code see
:mod:`actors.federated.flower.program`), and a round's messages are answered together. Strategies of
the older ``flwr.server.strategy`` run through :mod:`actors.federated.flower.legacy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from actors.federated.flower.clients import EngineClients, Update, join_arrays, split_flat
from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights

CLIENT_FAILED = 1


class EngineGrid(Grid):  # type: ignore[misc]
    """Answers a strategy's messages by training on our engine.

    Args:
        clients: the clients, and how they train.
    """

    def __init__(self, clients: EngineClients) -> None:
        self._clients = clients
        self._layout = clients.layout
        self._replies: dict[str, Any] = {}
        self._round = 0
        self._sent = 0
        # Messages take their sender from the process, as Flower's own start_grid arranges.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def initial_arrays(self) -> Any:
        """Freshly initialised weights under the model's own parameter names."""
        return self.record(self._clients.initial())

    def record(self, flat: FlatWeights) -> Any:
        """Flat weights as an ``ArrayRecord``."""
        return to_record(flat, self._layout.names, self._layout.shapes)

    def flat(self, record: Any) -> FlatWeights:
        """An ``ArrayRecord`` as flat weights.

        Raises:
            ConfigError: arrays of another model.
        """
        return to_flat(record, self._layout.shapes)

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Any:
        """An empty run."""
        return Run.create_empty(run_id=1)

    def create_message(
        self,
        content: Any,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Any:
        """A message to one client."""
        return Message(
            content=content, message_type=message_type, dst_node_id=dst_node_id,
            group_id=group_id, ttl=ttl,
        )  # fmt: skip

    def get_node_ids(self) -> Iterable[int]:
        """Clients, numbered from 1 as Flower wants."""
        return range(1, self._clients.population.n_clients + 1)

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        """Answer at once; the replies wait to be pulled."""
        ids = []
        for reply in self.send_and_receive(messages):
            self._sent += 1
            ids.append(str(self._sent))
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        """Replies to pushed messages, each once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> Iterable[Any]:
        """Train or evaluate the clients that the messages are for.

        Raises:
            ConfigError: a message type that no client understands, or arrays of another model.
        """
        del timeout  # every client answers
        batch = list(messages)
        kinds = {message.metadata.message_type for message in batch}
        if not kinds <= {MessageType.TRAIN, MessageType.EVALUATE}:
            raise ConfigError("message_type", kinds, "train or evaluate")
        train = [m for m in batch if m.metadata.message_type == MessageType.TRAIN]
        score = [m for m in batch if m.metadata.message_type == MessageType.EVALUATE]
        return [*self._train(train), *(self._evaluate(message) for message in score)]

    def _train(self, messages: list[Any]) -> list[Any]:
        if not messages:
            return []
        contents = [_parts(message.content) for message in messages]
        self._round = int(contents[0][1].get("server-round", self._round + 1))
        # Messages of one model share its record; a strategy of several models sends several.
        records = {id(arrays): arrays for arrays, _ in contents}
        row_of = {name: row for row, name in enumerate(records)}
        updates = self._clients.train(
            np.stack([self.flat(record) for record in records.values()]),
            np.array([row_of[id(arrays)] for arrays, _ in contents], dtype=np.int64),
            np.array([m.metadata.dst_node_id - 1 for m in messages], dtype=np.int64),
            self._round,
            [config for _, config in contents],
        )
        return [self._reply(message, update) for message, update in zip(messages, updates)]

    def _reply(self, message: Any, update: Update) -> Any:
        if update.weights is None:
            name = update.status.name.lower()
            return Message(
                Error(CLIENT_FAILED, f"the update was dropped: {name}"), reply_to=message
            )
        metrics = {"num-examples": update.n_samples, "train_loss": update.loss}
        arrays = self.record(update.weights)
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    def _evaluate(self, message: Any) -> Any:
        client = message.metadata.dst_node_id - 1
        score = self._clients.score(self.flat(_parts(message.content)[0]), client)
        if score is None:
            return Message(Error(CLIENT_FAILED, "the client has no samples"), reply_to=message)
        metrics = {"num-examples": score.n, "eval_loss": score.loss}
        if np.isfinite(score.accuracy):
            metrics["eval_acc"] = score.accuracy
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def to_record(flat: FlatWeights, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
    """Flat weights as an ``ArrayRecord`` of named arrays."""
    return ArrayRecord({n: Array(part) for n, part in zip(names, split_flat(flat, shapes))})


def to_flat(record: Any, shapes: Sequence[tuple[int, ...]]) -> FlatWeights:
    """An ``ArrayRecord`` as flat weights, float32 [P].

    Raises:
        ConfigError: arrays of other shapes.
    """
    return join_arrays(record.to_numpy_ndarrays(), shapes)


def _parts(content: Any) -> tuple[Any, Any]:
    """Arrays and configuration of a message; each the first of its kind, as strategies send."""
    arrays = next(iter(content.array_records.values()), None)
    if arrays is None:
        raise ConfigError("message", list(content), "an ArrayRecord")
    return arrays, next(iter(content.config_records.values()), {})
