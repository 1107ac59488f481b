"""Runs one task on a worker: chunks its clients, trains, screens, and folds them to one partial.

Pure: the partial depends on the task, the weights and the data only, so a lost task can be run
again anywhere. Screening happens here, before anything is summed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysys.errors import ConfigError
from raysys.federated.core.batching import all_samples, cut_chunks, draw_batches
from raysys.federated.core.ladder import (
    Trained,
    cached_module,
    check_layout,
    sample_losses,
    train_chunk,
)
from raysys.federated.core.messages import IntArray, Partial, Status, TrainTask
from raysys.federated.core.model import layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.program import Ran, run_programs
from raysys.federated.core.randomness import KeyedStreams, Purpose, generator, torch_seed
from raysys.federated.core.sketch import sketch_rows
from raysys.federated.core.updates import GroupedUpdates


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """Shared read-only sample arrays as tensors: inputs [N, ...] and targets [N] or [N, out]."""

    inputs: Tensor
    targets: Tensor


def train_task(
    task: TrainTask,
    weights_KP: npt.NDArray[np.float32],
    samples: Samples,
    population: Population,
    controls_kP: npt.NDArray[np.float32] | None = None,
) -> Partial:
    """Train the task's clients and return their partial sum.

    Args:
        weights_KP: stacked weights of the round, float32 [K, P]; never changed, may be read-only.
        controls_kP: SCAFFOLD's c - c_k of each client, float32 [k, P], or None.

    Raises:
        ConfigError: clients that do not exist or repeat, or weights of another shape.
    """
    clients = population.check_clients(task.clients)
    weights = read_only_tensor(weights_KP)
    check_layout(layout_of(task.spec), weights)
    if task.models != len(weights):
        raise ConfigError("weights", len(weights), f"{task.models} stacked models")
    fold = TaskFold(task, population.counts(clients), weights.shape[1])
    streams = KeyedStreams(task.seed, Purpose.BATCHES, task.round_id)
    for places in cut_chunks(fold.n_samples, task.local, task.chunk_size):
        if task.rung == "program":
            ran = run_programs(
                task.spec, weights, task.rows[places], clients[places], task.round_id
            )
            fold.add_programs(places, ran)
            continue
        batches = draw_batches(population, clients[places], task.local, streams)
        rows = torch.from_numpy(task.rows[places])
        drift = None if controls_kP is None else read_only_tensor(controls_kP)[places]
        with _dropout_seed(task, int(clients[places[0]])):
            trained = train_chunk(
                task.rung, task.spec, weights, rows, samples.inputs, samples.targets, batches,
                task.local, drift, task.feedback.halves,
            )  # fmt: skip
        losses = _received_losses(task, weights, rows, samples, population, clients[places])
        fold.add(places, trained, losses, batches.active)
    return fold.result()


class TaskFold:
    """Screens and sums the updates of a task's clients, chunk by chunk.

    Args:
        counts: samples of each client, int64 [k]; those without any count as empty.
        n_params: P.
    """

    def __init__(self, task: TrainTask, counts: IntArray, n_params: int) -> None:
        k = len(task.clients)
        self.n_samples = counts
        self._task = task
        self._present, self._own_row = np.unique(task.rows, return_inverse=True)
        self._n_params = n_params
        self._sum: npt.NDArray[Any] | None = None
        self._weight = np.zeros(len(self._present))
        self._scalar = np.zeros(len(self._present))
        self._columns = np.zeros((3, k), dtype=np.float32)
        self._status = np.where(counts > 0, Status.OK, Status.EMPTY).astype(np.int8)
        dim = task.feedback.sketch_dim
        self._sketch = np.zeros((k, dim), dtype=np.float32) if dim else None
        halves = dim and task.feedback.halves and not task.local_noise
        self._sketch_half = np.zeros((k, dim), dtype=np.float32) if halves else None
        self._controls = (
            np.zeros((k, n_params), dtype=np.float32) if task.feedback.controls else None
        )
        self._updates = None
        if task.feedback.update_group:
            self._updates = GroupedUpdates(task.rows, task.feedback.update_group, n_params)

    def add(
        self, places: IntArray, trained: Trained, losses: Tensor | None, active: list[int]
    ) -> None:
        """Screen a chunk and add it to the sums."""
        task, delta = self._task, trained.delta
        norm = torch.linalg.vector_norm(delta, dim=1)
        status = self._screen(norm, trained)
        kept = status == Status.OK
        factor = torch.ones_like(norm)
        if task.clip_norm is not None:
            factor = (task.clip_norm / norm.clamp_min(1e-30)).clamp_max(1.0)
        if not kept.all():
            delta[torch.from_numpy(~kept)] = 0.0
            factor[torch.from_numpy(~kept)] = 0.0
        if task.local_noise:
            delta = delta * factor.unsqueeze(1)
            delta += torch.from_numpy(self._noise(places, delta.shape[1]))
            factor = torch.from_numpy(kept.astype(np.float32))
        self._status[places] = status
        self._columns[:, places] = np.stack(
            [trained.loss_first.numpy(), trained.loss_last.numpy(), norm.numpy()]
        )
        weight, scalar = self._weights(places, norm * factor, losses)
        self._sum_rows(places, delta, factor.numpy().astype(np.float64), weight, scalar, kept)
        if self._updates is not None:
            self._updates.add(places, (delta * factor.unsqueeze(1)).numpy(), weight * kept)
        if self._sketch is not None:
            self._sketch[places] = self._project(delta, factor)
        if self._sketch_half is not None and trained.half is not None:
            trained.half[torch.from_numpy(~kept)] = 0.0
            self._sketch_half[places] = self._project(trained.half, factor)
        if self._controls is not None:
            # Option II of SCAFFOLD: c_k+ - c_k = -c - (w_k - w) / (steps * lr); -c is the server's.
            steps = np.array([(np.array(active) > i).sum() for i in range(len(places))])
            scale = torch.from_numpy((-1.0 / (steps * task.local.lr)).astype(np.float32))
            self._controls[places] = (delta * scale.unsqueeze(1)).numpy()

    def add_programs(self, places: IntArray, ran: Ran) -> None:
        """Screen and add clients that ran code of their own; they say how many samples they used.

        Raises:
            ConfigError: a strategy that needs to know how a client trained.
        """
        if self._task.feedback.controls or self._task.feedback.weighting == "loss":
            raise ConfigError("server", "scaffold or qfedavg", "another server for client programs")
        self.n_samples[places] = ran.n_samples
        good = np.flatnonzero(~ran.failed)
        if len(good):
            kept = Trained(ran.delta[good], ran.loss_first[good], ran.loss_last[good])
            self.add(places[good], kept, None, [])
        self.mark(places[ran.failed], Status.FAILED)

    def mark(self, places: IntArray, status: Status) -> None:
        """Say what became of clients that gave no update."""
        self._status[places] = status

    def result(self) -> Partial:
        """The finished partial."""
        task, groups = self._task, self._updates
        sums = self._sum
        if sums is None:
            sums = np.zeros((len(self._present), self._n_params), dtype=np.float32)
        if task.local_noise:  # what is not noisy does not leave the client
            self._columns[:] = np.nan
        return Partial(
            round_id=task.round_id,
            attempt=task.attempt,
            task_id=task.task_id,
            spec_id=task.spec.spec_id,
            clients=task.clients,
            rows=task.rows,
            present=self._present,
            sum_delta=sums,
            sum_weight=self._weight,
            sum_scalar=self._scalar,
            loss_first=self._columns[0],
            loss_last=self._columns[1],
            norm=self._columns[2],
            n_samples=self.n_samples,
            status=self._status,
            sketch=self._sketch,
            sketch_half=self._sketch_half,
            controls=self._controls,
            updates=None if groups is None else groups.means(),
            update_weight=None if groups is None else groups.weight,
            update_row=None if groups is None else groups.row,
        )

    def _project(self, delta: Tensor, factor: Tensor) -> npt.NDArray[np.float32]:
        """Sketches of scaled updates, of their last part only where the strategy wants that."""
        feedback = self._task.feedback
        first = delta.shape[1] - max(1, round(feedback.sketch_tail * delta.shape[1]))
        scaled = (delta[:, first:] * factor.unsqueeze(1)).numpy()
        return sketch_rows(scaled, feedback.sketch_dim, feedback.sketch_density, self._task.seed)

    def _screen(self, norm: Tensor, trained: Trained) -> npt.NDArray[np.int8]:
        finite = (torch.isfinite(norm) & torch.isfinite(trained.loss_last)).numpy()
        far = (norm > self._task.reject_above).numpy()
        status = np.where(far, Status.REJECTED, Status.OK)
        return np.where(finite, status, Status.NONFINITE).astype(np.int8)

    def _weights(
        self, places: IntArray, norm: Tensor, losses: Tensor | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Weight of each client, and its term of q-FedAvg's denominator."""
        feedback = self._task.feedback
        if feedback.weighting == "samples":
            return self.n_samples[places].astype(np.float64), np.zeros(len(places))
        if feedback.weighting == "uniform":
            return np.ones(len(places)), np.zeros(len(places))
        assert losses is not None
        loss = np.maximum(losses.numpy().astype(np.float64), 1e-10)
        inverse_lr = 1.0 / self._task.local.lr
        squared = (inverse_lr * norm.numpy().astype(np.float64)) ** 2
        weight = loss**feedback.q
        return weight, feedback.q * loss ** (feedback.q - 1) * squared + inverse_lr * weight

    def _sum_rows(
        self,
        places: IntArray,
        delta: Tensor,
        factor: npt.NDArray[np.float64],
        weight: npt.NDArray[np.float64],
        scalar: npt.NDArray[np.float64],
        kept: npt.NDArray[np.bool_],
    ) -> None:
        rows = self._own_row[places]
        present = np.unique(rows)
        here = (rows[None, :] == present[:, None]) & kept[None, :]
        # One product for all models reads the updates once.
        mix = torch.from_numpy(np.where(here, weight * factor, 0.0).astype(np.float32))
        self._add_rows(present, (mix @ delta).numpy())
        self._weight[present] += (here * weight).sum(axis=1)
        self._scalar[present] += (here * scalar).sum(axis=1)

    def _add_rows(self, present: IntArray, sums: npt.NDArray[np.float32]) -> None:
        """Add a chunk's sums; those of the only chunk stay float32, which is half the message."""
        if self._sum is None and len(present) == len(self._present):
            self._sum = sums
            return
        if self._sum is None:
            self._sum = np.zeros((len(self._present), self._n_params))
        elif self._sum.dtype == np.float32:
            self._sum = self._sum.astype(np.float64)
        for row, part in zip(present.tolist(), sums):
            self._sum[row] += part  # in place: indexing by the array would copy all rows

    def _noise(self, places: IntArray, n_params: int) -> npt.NDArray[np.float32]:
        task = self._task
        draws = [
            generator(task.seed, Purpose.PRIVACY, task.round_id, int(client) + 1)
            for client in task.clients[places]
        ]
        noise = [rng.standard_normal(n_params, dtype=np.float32) for rng in draws]
        return np.stack(noise) * np.float32(task.local_noise)


@contextlib.contextmanager
def _dropout_seed(task: TrainTask, client: int) -> Iterator[None]:
    """Seed torch's own generator for modules that draw (dropout); kernels never do."""
    if task.rung == "batched":
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(task.seed + task.round_id, Purpose.BATCHES, client))
        yield


def _received_losses(
    task: TrainTask,
    weights: Tensor,
    rows: Tensor,
    samples: Samples,
    population: Population,
    clients: IntArray,
) -> Tensor | None:
    """Mean loss of the received weights over all samples of each client; for q-FedAvg only."""
    if task.feedback.weighting != "loss":
        return None
    index, scale = all_samples(population, clients)
    layout, module = layout_of(task.spec), cached_module(task.spec)

    def one(params: tuple[Tensor, ...], x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        out = torch.func.functional_call(module, dict(zip(layout.names, params)), (x,))
        return (sample_losses(out, y, task.spec.task) * weight).sum()

    with torch.no_grad():
        mapped: Any = torch.func.vmap(one, randomness="different")
        result: Tensor = mapped(
            tuple(layout.split(weights[rows])), samples.inputs[index], samples.targets[index], scale
        )
    return result


def read_only_tensor(array: npt.NDArray[np.float32]) -> Tensor:
    """Tensor over an array that may be read-only; torch would warn, and nobody here writes it."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
