"""Start-up calibration: times the rungs of the ladder on a few clients and picks the fastest.

The clock is passed in. The result goes into the job's configuration and checkpoint, so that a
resumed job does not measure again and computes the same.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from raysys.federated.core.engine import ExecutionConfig
from raysys.federated.core.ladder import available_rungs
from raysys.federated.core.messages import TrainTask
from raysys.federated.core.model import FlatWeights
from raysys.federated.core.population import Population
from raysys.federated.core.training import Samples, train_task

Clock = Callable[[], float]
TASK_SECONDS = 0.25


def time_rungs(
    task: TrainTask,
    weights: FlatWeights,
    samples: Samples,
    population: Population,
    clock: Clock,
    repeats: int = 3,
) -> dict[str, float]:
    """Clients per second of each rung that can train the model; the first run is not counted."""
    speed = {}
    stacked = weights.reshape(task.models, -1)
    for rung in available_rungs(task.spec):
        trial = dataclasses.replace(task, rung=rung)
        times = []
        for _ in range(repeats + 1):
            begin = clock()
            train_task(trial, stacked, samples, population)
            times.append(clock() - begin)
        speed[rung] = len(task.clients) / max(statistics.median(times[1:]), 1e-9)
    return speed


def choose(
    speed: dict[str, float], execution: ExecutionConfig, clients_per_round: int, workers: int
) -> ExecutionConfig:
    """Take the fastest rung, and tasks of about a quarter of a second, at least two per worker."""
    rung = max(speed, key=lambda name: speed[name])
    by_time = max(1, int(speed[rung] * TASK_SECONDS))
    by_share = max(1, -(-clients_per_round // (2 * max(workers, 1))))
    task_clients = min(by_time, by_share)
    return dataclasses.replace(
        execution,
        rung=rung,
        task_clients=task_clients,
        chunk_size=min(execution.chunk_size, task_clients),
    )
