"""The worker: one per core, holds views of the data, trains whatever task it is handed.

A plain class; the coordinator applies ``ray.remote``. A task's result is a pure function of its
arguments, so a task of a dead worker can be run again on any other.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysys.federated.core.calibration import time_rungs
from raysys.federated.core.combining import Sums, split_sums
from raysys.federated.core.datasets import as_samples
from raysys.federated.core.evaluation import Score, client_scores, evaluate
from raysys.federated.core.messages import Partial, TrainTask
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import IntArray, Population
from raysys.federated.core.training import train_task


class WorkerActor:
    """Trains and evaluates on one core.

    Args:
        inputs, targets: training samples; read-only views of the object store under Ray.
        test_inputs, test_targets: the central test set.
        population: the clients.
        clock: CPU seconds of this process.
    """

    def __init__(
        self,
        inputs: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        test_inputs: npt.NDArray[Any],
        test_targets: npt.NDArray[Any],
        population: Population,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        # Two threads on small tensors wait for each other at every step.
        torch.set_num_threads(1)
        self._samples = as_samples(inputs, targets)
        self._test = as_samples(test_inputs, test_targets)
        self._population = population
        self._clock = clock
        self._tasks = 0

    def train(
        self,
        weights_KP: npt.NDArray[np.float32],
        task: TrainTask,
        controls_kP: npt.NDArray[np.float32] | None = None,
    ) -> Partial:
        """Run one task; see :func:`raysys.federated.core.training.train_task`."""
        begin = self._clock()
        partial = train_task(task, weights_KP, self._samples, self._population, controls_kP)
        self._tasks += 1
        return dataclasses.replace(partial, busy_s=self._clock() - begin)

    def train_split(
        self,
        weights_KP: npt.NDArray[np.float32],
        task: TrainTask,
        controls_kP: npt.NDArray[np.float32] | None = None,
    ) -> tuple[Partial, Sums]:
        """As :meth:`train`, with the large sums apart, for a combiner to fetch."""
        return split_sums(self.train(weights_KP, task, controls_kP))

    def evaluate(
        self, weights_MP: npt.NDArray[np.float32], spec: ModelSpec, mix: list[float]
    ) -> Score:
        """Score a mixture of models (or one) on the central test set."""
        return evaluate(spec, weights_MP, self._test, mix)

    def client_scores(
        self,
        weights_MP: npt.NDArray[np.float32],
        spec: ModelSpec,
        mix: list[float],
        clients: IntArray,
    ) -> npt.NDArray[np.float64]:
        """Accuracy of a mixture of models on each client's own samples."""
        return client_scores(spec, weights_MP, self._samples, self._population, clients, mix)

    def calibrate(self, weights_KP: npt.NDArray[np.float32], task: TrainTask) -> dict[str, float]:
        """Clients per second of every rung that can train the task's model."""
        return time_rungs(task, weights_KP, self._samples, self._population, time.perf_counter)

    def health(self) -> dict[str, Any]:
        """Process id, tasks done, and CPU seconds used."""
        return {"pid": os.getpid(), "tasks": self._tasks, "cpu_s": time.process_time()}

    def close(self) -> None:
        """Nothing to release; the arrays belong to the object store."""
