"""A Flower ``Grid`` whose nodes are our clients: any message-based Flower strategy runs unchanged.

    grid = EngineGrid(data, population, spec, LocalConfig(lr=0.1))
    strategy = flwr.serverapp.strategy.FedAdam(fraction_train=0.1)
    result = strategy.start(grid, grid.initial_arrays(), num_rounds=50)

The strategy's messages of a round become a few tasks of our engine, which train all clients of a
chunk as one tensor program; every client's own weights go back to the strategy, since medians,
Krum and the like look at each. Differences from Flower's simulation: clients are rows of an array
instead of processes, ``ClientApp`` code does not run (for your own client code see
:mod:`actors.federated.flower.program`), and a round's messages are answered together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from actors.federated.pool import Call, WorkerPool
from actors.federated.worker import WorkerActor
from raysys.errors import ConfigError
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import client_scores
from raysys.federated.core.ladder import static_rung
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, Partial, Status, TrainTask
from raysys.federated.core.model import FlatWeights, ModelSpec, initial_weights, layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.training import train_task

RunTasks = Callable[[npt.NDArray[np.float32], list[TrainTask]], list[Partial]]
CLIENT_FAILED = 1
TASK_CLIENTS = 50


class EngineGrid(Grid):  # type: ignore[misc]
    """Answers a strategy's messages by training on our engine.

    Args:
        data, population, spec: the samples, the clients, and the model.
        local: local training; a strategy's configuration may override ``lr`` and, as FedProx
            does, ``proximal-mu``.
        run_tasks: where tasks run; None is this process, see :func:`on_workers` for Ray.
        seed: seed of the clients' batches.
    """

    def __init__(
        self,
        data: FederatedData,
        population: Population,
        spec: ModelSpec,
        local: LocalConfig,
        run_tasks: RunTasks | None = None,
        seed: int = 0,
    ) -> None:
        self._samples = data.samples()
        self._population = population
        self._spec = spec
        self._local = local
        self._run_tasks = run_tasks or self._here
        self._seed = seed
        self._layout = layout_of(spec)
        self._replies: dict[str, Any] = {}
        self._round = 0
        self._sent = 0
        # Messages take their sender from the process, as Flower's own start_grid arranges.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def initial_arrays(self) -> Any:
        """Freshly initialised weights under the model's own parameter names."""
        return self.record(initial_weights(self._spec, self._seed).values)

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
        return range(1, self._population.n_clients + 1)

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
        weights = np.stack([self.flat(record) for record in records.values()])
        clients = np.array([m.metadata.dst_node_id - 1 for m in messages], dtype=np.int64)
        rows = np.array([row_of[id(arrays)] for arrays, _ in contents], dtype=np.int64)
        local = self._local_for(contents[0][1])
        order = np.lexsort((clients, rows))
        pieces = [order[at : at + TASK_CLIENTS] for at in range(0, len(order), TASK_CLIENTS)]
        tasks = [
            self._task(number, clients[piece], rows[piece], len(weights), local)
            for number, piece in enumerate(pieces)
        ]
        replies: list[Any] = [None] * len(messages)
        for piece, partial in zip(pieces, self._run_tasks(weights, tasks)):
            assert partial.updates is not None
            for place, message in enumerate(piece.tolist()):
                moved = weights[rows[message]] + partial.updates[place]
                replies[message] = self._reply(messages[message], partial, place, moved)
        return replies

    def _local_for(self, config: Any) -> LocalConfig:
        """Local training with what the strategy's configuration overrides."""
        changes = {"lr": config.get("lr"), "prox_mu": config.get("proximal-mu")}
        given = {name: float(value) for name, value in changes.items() if value is not None}
        return dataclasses.replace(self._local, **given)  # type: ignore[arg-type]

    def _task(
        self,
        number: int,
        clients: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        models: int,
        local: LocalConfig,
    ) -> TrainTask:
        return TrainTask(
            round_id=self._round,
            attempt=0,
            task_id=number,
            spec=self._spec,
            clients=clients,
            rows=rows,
            models=models,
            local=local,
            feedback=FeedbackSpec(weighting="uniform", update_group=1),
            seed=self._seed,
            rung=static_rung(self._spec),
            chunk_size=TASK_CLIENTS,
        )

    def _reply(self, message: Any, partial: Partial, place: int, moved: FlatWeights) -> Any:
        status = Status(int(partial.status[place]))
        if status is not Status.OK:
            error = Error(CLIENT_FAILED, f"the update was dropped: {status.name.lower()}")
            return Message(error, reply_to=message)
        metrics = {
            "num-examples": int(partial.n_samples[place]),
            "train_loss": float(partial.loss_last[place]),
        }
        content = RecordDict({"arrays": self.record(moved), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    def _evaluate(self, message: Any) -> Any:
        client = message.metadata.dst_node_id - 1
        flat = self.flat(_parts(message.content)[0])
        ids = np.array([client], dtype=np.int64)
        score = client_scores(self._spec, flat, self._samples, self._population, ids)[0]
        if not np.isfinite(score):
            return Message(Error(CLIENT_FAILED, "the client has no samples"), reply_to=message)
        name = "eval_loss" if self._spec.task == "regression" else "eval_acc"
        metrics = {"num-examples": int(self._population.counts(ids)[0]), name: float(score)}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    def _here(self, weights: npt.NDArray[np.float32], tasks: list[TrainTask]) -> list[Partial]:
        return [train_task(task, weights, self._samples, self._population) for task in tasks]


def on_workers(
    data: FederatedData, population: Population, workers: int, worker_cpus: float = 1
) -> tuple[RunTasks, WorkerPool]:
    """Run a grid's tasks on worker actors of the running Ray session.

    Returns:
        What :class:`EngineGrid` takes as ``run_tasks``, and the pool, to be closed by the caller.
    """
    parts = [ray.put(part) for part in (
        data.inputs, data.targets, data.test_inputs, data.test_targets, population
    )]  # fmt: skip
    remote = ray.remote(WorkerActor).options(num_cpus=worker_cpus, max_restarts=0)
    pool = WorkerPool(lambda: remote.remote(*parts), workers)

    def run_tasks(weights: npt.NDArray[np.float32], tasks: list[TrainTask]) -> list[Partial]:
        stored = ray.put(weights)
        calls = [Call(number, "train", (stored, task)) for number, task in enumerate(tasks)]
        found: dict[int, Partial] = dict(pool.run(calls))
        return [found[number] for number in range(len(tasks))]

    return run_tasks, pool


def to_record(flat: FlatWeights, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
    """Flat weights as an ``ArrayRecord`` of named arrays."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(flat, ends[:-1])
    return ArrayRecord(
        {name: Array(part.reshape(shape)) for name, part, shape in zip(names, parts, shapes)}
    )


def to_flat(record: Any, shapes: Sequence[tuple[int, ...]]) -> FlatWeights:
    """An ``ArrayRecord`` as flat weights, float32 [P].

    Raises:
        ConfigError: arrays of other shapes.
    """
    arrays = record.to_numpy_ndarrays()
    found = tuple(tuple(part.shape) for part in arrays)
    if found != tuple(shapes):
        raise ConfigError("arrays", found, f"shapes {tuple(shapes)}")
    flat: FlatWeights = np.concatenate([part.astype(np.float32).reshape(-1) for part in arrays])
    return flat


def _parts(content: Any) -> tuple[Any, Any]:
    """Arrays and configuration of a message; each the first of its kind, as strategies send."""
    arrays = next(iter(content.array_records.values()), None)
    if arrays is None:
        raise ConfigError("message", list(content), "an ArrayRecord")
    return arrays, next(iter(content.config_records.values()), {})
