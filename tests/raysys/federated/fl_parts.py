"""What the tests of the federated core share: a small model, samples, clients and tasks."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, TrainTask
from raysys.federated.core.model import (
    Mlp,
    ModelSpec,
)
from raysys.federated.core.population import Population, population_from_lists
from raysys.federated.core.training import Samples

SMALL = ModelSpec(architecture=Mlp(sizes=(4, 6, 3)))


def small_samples(n: int = 60, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((n, 4), dtype=np.float32)
    return Samples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(0, 3, n)))


def ragged_population(sizes: list[int], n: int = 60, seed: int = 0) -> Population:
    rng = np.random.default_rng(seed)
    return population_from_lists([rng.integers(0, n, size) for size in sizes])


def make_task(clients: list[int], **changes: object) -> TrainTask:
    task = TrainTask(
        round_id=0,
        attempt=0,
        task_id=0,
        spec=SMALL,
        clients=np.array(clients, dtype=np.int64),
        rows=np.zeros(len(clients), dtype=np.int64),
        models=1,
        local=LocalConfig(batch_size=4),
        feedback=FeedbackSpec(),
        seed=7,
        rung="batched",
        chunk_size=50,
    )
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]
