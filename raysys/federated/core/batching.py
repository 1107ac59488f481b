"""Cuts a round's clients into chunks and writes down which sample each step of each client uses.

Clients of a chunk are sorted by falling number of steps, so those that still train are always a
prefix: nothing is padded along the steps. Along the batch, chunks are cut so that padding stays
below a tenth.

Dimensions: C clients, S steps, B places of a batch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysys.federated.core.local import LocalConfig
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import KeyedStreams

IntArray = npt.NDArray[np.int64]
MAX_PADDING = 0.1
MIN_CHUNK = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """The batches of one chunk, step by step.

    Args:
        index: [S, C, B], int64 rows of the sample arrays.
        scale: [S, C, B], float32 weight of each place: 1 / batch size, or 0 beyond a short batch.
        active: clients (a prefix) that still train in each step.
    """

    index: Tensor
    scale: Tensor
    active: list[int]


def cut_chunks(counts: IntArray, config: LocalConfig, chunk_size: int) -> list[IntArray]:
    """Return the positions of each chunk's clients; clients without samples are in none.

    Args:
        counts: samples of each client, int64 [k].
        chunk_size: largest number of clients in a chunk.
    """
    steps = config.steps_of(counts)
    order = np.lexsort((np.arange(len(counts)), -counts, -steps))
    order = order[counts[order] > 0]
    chunks: list[IntArray] = []
    start, used, width = 0, 0, 0
    for place, client in enumerate(order):
        n = min(int(counts[client]), config.batch_size)
        size = place - start
        padded = 1 - (used + n) / (max(width, n) * (size + 1))
        if size and (size == chunk_size or (size >= MIN_CHUNK and padded > MAX_PADDING)):
            chunks.append(order[start:place])
            start, used, width = place, 0, 0
        used, width = used + n, max(width, n)
    if start < len(order):
        chunks.append(order[start:])
    return chunks


def draw_batches(
    population: Population, clients: IntArray, config: LocalConfig, streams: KeyedStreams
) -> Batches:
    """Draw the batches of a chunk whose clients are sorted by falling number of steps.

    Each epoch is a fresh shuffle of the client's samples by its own stream; the last batch of an
    epoch may be short.
    """
    counts = population.counts(clients)
    steps = config.steps_of(counts)
    width = min(config.batch_size, int(counts.max()))
    index = np.zeros((len(clients), int(steps[0]), width), dtype=np.int64)
    scale = np.zeros((len(clients), int(steps[0]), width), dtype=np.float32)
    for n in np.unique(counts):
        members = np.flatnonzero(counts == n)
        rows = _shuffled_rows(population, clients[members], int(n), config, streams)
        places, weights = _cut_epochs(rows, config.batch_size, width)
        own = int(steps[members[0]])
        index[members, :own] = places[:, :own]
        scale[members, :own] = weights[:own]
    active = (steps[None, :] > np.arange(int(steps[0]))[:, None]).sum(axis=1)
    return Batches(
        index=torch.from_numpy(index.swapaxes(0, 1).copy()),
        scale=torch.from_numpy(scale.swapaxes(0, 1).copy()),
        active=active.tolist(),
    )


def all_samples(population: Population, clients: IntArray) -> tuple[Tensor, Tensor]:
    """Every sample of each client once: index int64 [C, n] and mean weights float32 [C, n]."""
    counts = population.counts(clients)
    width = int(counts.max())
    place = np.arange(width)[None, :]
    valid = place < counts[:, None]
    flat = np.where(valid, population.offsets[clients][:, None] + place, 0)
    index = np.where(valid, population.sample_ids[flat], 0).astype(np.int64)
    scale = np.where(valid, 1.0 / np.maximum(counts, 1)[:, None], 0.0).astype(np.float32)
    return torch.from_numpy(index), torch.from_numpy(scale)


def _shuffled_rows(
    population: Population, clients: IntArray, n: int, config: LocalConfig, streams: KeyedStreams
) -> IntArray:
    """Sample rows in training order for clients of equal size, int64 [clients, epochs, n]."""
    epochs = config.epochs_for(n)
    keys = np.stack([streams.raw(int(client), epochs * n) for client in clients])
    order = np.argsort(keys.reshape(len(clients), epochs, n), axis=-1, kind="stable")
    first = population.offsets[clients][:, None, None]
    rows: IntArray = population.sample_ids[first + order].astype(np.int64)
    return rows


def _cut_epochs(
    rows: IntArray, batch_size: int, width: int
) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Cut [c, epochs, n] rows into batches: [c, steps, width] rows and [steps, width] weights."""
    c, epochs, n = rows.shape
    per_epoch = -(-n // batch_size)
    places = np.zeros((c, epochs, per_epoch * batch_size), dtype=np.int64)
    places[:, :, :n] = rows
    weights = np.zeros((per_epoch, batch_size), dtype=np.float32)
    weights.reshape(-1)[:n] = 1.0
    weights /= weights.sum(axis=1, keepdims=True)
    cut = places.reshape(c, epochs * per_epoch, batch_size)[:, :, :width]
    return cut, np.tile(weights, (epochs, 1))[:, :width]
