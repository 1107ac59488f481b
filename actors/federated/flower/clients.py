"""The clients that Flower's strategies see: training and scoring on our engine, many at once.

Both of Flower's interfaces end here: messages (:mod:`grid`) and the older ``fit`` and ``evaluate``
instructions (:mod:`legacy`). A round's instructions become a few tasks of our engine, which train
all clients of a chunk as one tensor program; every client's own weights go back, since medians,
Krum and the like look at each.

Dimensions: M models sent in a round, P parameters, k clients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from actors.federated.pool import Call, WorkerPool
from actors.federated.worker import WorkerActor
from raysys.errors import ConfigError
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import Score, evaluate
from raysys.federated.core.ladder import static_rung
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, Partial, Status, TrainTask
from raysys.federated.core.model import FlatWeights, ModelSpec, initial_weights, layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.training import Samples, train_task

RunTasks = Callable[[npt.NDArray[np.float32], list[TrainTask]], list[Partial]]
TASK_CLIENTS = 50
# What a strategy's configuration may override, by the name after dashes became underscores.
OVERRIDES: dict[str, tuple[str, type]] = {
    "lr": ("lr", float),
    "proximal_mu": ("prox_mu", float),
    "local_epochs": ("epochs", int),
    "batch_size": ("batch_size", int),
}
KNOWN = ("server_round", *OVERRIDES)
CLIENT_SIDE_PRIVACY = ("clipping_norm", "dpfedavg_clip_norm")


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """What one client gave: its weights float32 [P], or None with the reason in ``status``."""

    weights: FlatWeights | None
    status: Status
    n_samples: int
    loss: float


class EngineClients:
    """Clients as rows of an array.

    Args:
        data, population, spec: the samples, the clients, and the model.
        local: local training, as far as a strategy's configuration does not override it.
        run_tasks: where tasks run; None is this process, see :func:`on_workers` for Ray.
        seed: seed of the clients' batches and of the first weights.
        ignored: keys of a strategy's configuration that mean nothing to local training.
    """

    def __init__(
        self,
        data: FederatedData,
        population: Population,
        spec: ModelSpec,
        local: LocalConfig,
        run_tasks: RunTasks | None = None,
        seed: int = 0,
        ignored: Collection[str] = (),
    ) -> None:
        self.population = population
        self.layout = layout_of(spec)
        self._samples = data.samples()
        self._spec = spec
        self._local = local
        self._run_tasks = run_tasks or self._here
        self._seed = seed
        self._ignored = {name.replace("-", "_") for name in ignored}

    def initial(self) -> FlatWeights:
        """Freshly initialised weights."""
        return initial_weights(self._spec, self._seed).values

    def train(
        self,
        weights_MP: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int64],
        clients: npt.NDArray[np.int64],
        round_id: int,
        configs: Sequence[Mapping[str, Any]],
    ) -> list[Update]:
        """Train each client from its row of the weights, in the order given.

        Args:
            configs: what the strategy sent to each; ``lr``, ``proximal-mu``, ``local-epochs`` and
                ``batch-size`` override the local training (dashes or underscores).

        Raises:
            ConfigError: a key that would silently mean nothing, or one that asks clients to make
                their update private; or a value that local training refuses.
        """
        alike: dict[LocalConfig, list[int]] = {}
        for place, config in enumerate(configs):
            alike.setdefault(self._local_for(config), []).append(place)
        pieces: list[npt.NDArray[np.int64]] = []
        tasks: list[TrainTask] = []
        for local, places in alike.items():
            own = np.array(places, dtype=np.int64)
            own = own[np.lexsort((clients[own], rows[own]))]
            for at in range(0, len(own), TASK_CLIENTS):
                pieces.append(piece := own[at : at + TASK_CLIENTS])
                tasks.append(
                    self._task(
                        len(tasks), clients[piece], rows[piece], len(weights_MP), local, round_id
                    )
                )
        updates: list[Update] = [Update(None, Status.EMPTY, 0, float("nan"))] * len(clients)
        for piece, partial in zip(pieces, self._run_tasks(weights_MP, tasks)):
            assert partial.updates is not None
            for place, client in enumerate(piece.tolist()):
                status = Status(int(partial.status[place]))
                moved = weights_MP[rows[client]] + partial.updates[place]
                updates[client] = Update(
                    moved if status is Status.OK else None,
                    status,
                    int(partial.n_samples[place]),
                    float(partial.loss_last[place]),
                )
        return updates

    def score(self, weights: FlatWeights, client: int) -> Score | None:
        """Loss and accuracy on a client's own samples; None if it has none."""
        rows = torch.from_numpy(self.population.samples(client).astype(np.int64))
        if not len(rows):
            return None
        own = Samples(self._samples.inputs[rows], self._samples.targets[rows])
        return evaluate(self._spec, weights, own)

    def _local_for(self, config: Mapping[str, Any]) -> LocalConfig:
        changes: dict[str, Any] = {}
        for key, value in config.items():
            name = key.replace("-", "_")
            if name in self._ignored:
                continue
            if name in CLIENT_SIDE_PRIVACY:
                raise ConfigError(
                    f"config.{key}", value, "no client-side privacy",
                    "Use the server-side variant of the strategy, or recipe.privacy of our engine",
                )  # fmt: skip
            if name not in KNOWN:
                raise ConfigError(
                    f"config.{key}", value, f"one of {KNOWN}",
                    "Name it in `ignored` if local training need not know it",
                )  # fmt: skip
            if name in OVERRIDES and value is not None:
                field, kind = OVERRIDES[name]
                changes[field] = kind(value)
        if "epochs" in changes:
            changes["steps"] = None  # one of both says how long
        return dataclasses.replace(self._local, **changes)

    def _task(
        self,
        number: int,
        clients: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        models: int,
        local: LocalConfig,
        round_id: int,
    ) -> TrainTask:
        return TrainTask(
            round_id=round_id,
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

    def _here(self, weights: npt.NDArray[np.float32], tasks: list[TrainTask]) -> list[Partial]:
        return [train_task(task, weights, self._samples, self.population) for task in tasks]


def on_workers(
    data: FederatedData, population: Population, workers: int, worker_cpus: float = 1
) -> tuple[RunTasks, WorkerPool]:
    """Run tasks on worker actors of the running Ray session.

    Returns:
        What :class:`EngineClients` takes as ``run_tasks``, and the pool, which the caller closes.
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


def split_flat(
    flat: FlatWeights, shapes: Sequence[tuple[int, ...]]
) -> list[npt.NDArray[np.float32]]:
    """Flat weights as arrays of the model's shapes."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes)]


def join_arrays(
    arrays: Sequence[npt.NDArray[Any]], shapes: Sequence[tuple[int, ...]]
) -> FlatWeights:
    """Arrays of the model's shapes as flat weights, float32 [P].

    Raises:
        ConfigError: arrays of other shapes.
    """
    found = tuple(tuple(part.shape) for part in arrays)
    if found != tuple(shapes):
        raise ConfigError("arrays", found, f"shapes {tuple(shapes)}")
    flat: FlatWeights = np.concatenate([part.astype(np.float32).reshape(-1) for part in arrays])
    return flat
