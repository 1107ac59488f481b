"""The score store: actors that own id ranges, and the router that training workers talk to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError, RemoteError
from raysys.training.ccs.accumulator import ScoreAccumulator, ScoringConfig
from raysys.training.ccs.dynamics import StatBatch
from raysys.training.ccs.store import read_snapshot, split, write_snapshot
from raysys.training.ccs.table import ScoreTable

SHARD_ROWS = 5_000_000


class ScoreStoreActor:
    """Accumulates one id range; one actor per ``SHARD_ROWS`` examples.

    Args:
        ids: the examples of this shard.
        snapshot: file to write after each epoch and to restart from; None keeps memory only.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        config: ScoringConfig | None = None,
        snapshot: str | None = None,
    ) -> None:
        self._store = ScoreAccumulator(np.array(ids), config)
        self._snapshot = snapshot
        self._closed = False
        if snapshot is not None:
            self._restore(snapshot)

    def _restore(self, snapshot: str) -> None:
        storage, name = split(snapshot)
        if storage.exists(name):
            self._store.load_state_dict(read_snapshot(snapshot))

    def add(self, batch: StatBatch) -> None:
        """Take a batch in; a retry of the same (epoch, rank, sequence) counts once."""
        self._store.add(batch)

    def reopen(self, epoch: int) -> None:
        """Forget an epoch so that it can be replayed."""
        self._store.reopen(epoch)

    def commit(self, epoch: int, expected: int | None = None) -> int:
        """Apply an epoch and write the snapshot; idempotent. Returns the examples visited.

        Raises:
            RemoteError: fewer batches than ``expected`` are here (this actor was restarted).
        """
        visited = self._store.commit(epoch, expected)
        if self._snapshot is not None and visited:
            write_snapshot(self._snapshot, self._store.state_dict())
        return visited

    def table(self) -> ScoreTable:
        """Scores of this shard."""
        return self._store.to_table()

    def health(self) -> dict[str, Any]:
        """Committed epoch, state size, whether closed."""
        return {
            "committed_epoch": self._store.committed_epoch,
            "state_bytes": self._store.state_bytes,
            "closed": self._closed,
        }

    def close(self) -> None:
        """Nothing is held open; may be called twice."""
        self._closed = True


class ShardedStore:
    """Routes batches to the actors that own their ids; use its ``add`` as a recorder's sink.

    Args:
        ids: all example ids.
        snapshot_folder: each shard writes ``shard-<n>.parquet`` there after each epoch.
        max_restarts: times that Ray may restart a shard from its snapshot (never without one,
            which would lose the epochs before).
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        config: ScoringConfig | None = None,
        *,
        snapshot_folder: str | None = None,
        shard_rows: int = SHARD_ROWS,
        max_restarts: int = 3,
    ) -> None:
        import ray

        self._bounds, parts = split_ids(ids, shard_rows)
        restarts = max_restarts if snapshot_folder is not None else 0
        actor = ray.remote(num_cpus=0, max_restarts=restarts, max_task_retries=1)(ScoreStoreActor)
        self.shards = [
            actor.remote(
                part,
                config,
                None if snapshot_folder is None else f"{snapshot_folder}/shard-{n}.parquet",
            )
            for n, part in enumerate(parts)
        ]
        self._sent: list[Any] = []
        self._epoch_parts: list[tuple[int, StatBatch]] = []

    def add(self, batch: StatBatch) -> None:
        """Send a batch without waiting; errors surface at :meth:`commit`.

        An epoch's batches are kept until it is committed, to replay them to a restarted shard.
        """
        for shard, part in route(batch, self._bounds):
            self._epoch_parts.append((shard, part))
            self._sent.append(self.shards[shard].add.remote(part))

    def settle(self) -> None:
        """Wait until everything sent has arrived (an epoch's end needs no call: commit waits)."""
        sent, self._sent = self._sent, []
        self._get(sent)

    def reopen(self, epoch: int) -> None:
        """Forget an epoch on all shards."""
        import ray

        self._sent = []
        self._epoch_parts = [item for item in self._epoch_parts if item[1].epoch != epoch]
        ray.get([shard.reopen.remote(epoch) for shard in self.shards])

    def commit(self, epoch: int) -> int:
        """Wait for what was sent, then apply the epoch everywhere; returns the examples visited.

        A shard that died lost its uncommitted batches: they are sent again, once.

        Raises:
            ConfigError: what a shard rejected (unknown ids, changed labels).
            RemoteError: a shard cannot be restarted, or lost batches again.
        """
        self.settle()
        visited = 0
        for index, shard in enumerate(self.shards):
            keys = {part.key for owner, part in self._epoch_parts if owner == index}
            try:
                visited += self._get([shard.commit.remote(epoch, len(keys))])[0]
            except RemoteError:
                mine = [part for owner, part in self._epoch_parts if owner == index]
                self._get([shard.add.remote(part) for part in mine])
                visited += self._get([shard.commit.remote(epoch, len(keys))])[0]
        self._epoch_parts = [item for item in self._epoch_parts if item[1].epoch > epoch]
        return visited

    def _get(self, references: list[Any]) -> list[Any]:
        import ray

        try:
            answers: list[Any] = ray.get(references)
        except ray.exceptions.RayActorError as error:
            remedy = "Start the store again from its snapshots"
            raise RemoteError("score store", f"a shard is gone ({error})", remedy) from error
        return answers

    def table(self) -> ScoreTable:
        """Scores of all examples, ordered by id."""
        import ray

        parts: list[ScoreTable] = ray.get([shard.table.remote() for shard in self.shards])
        labels = [part.need_labels("the score table") for part in parts]
        scores = {
            name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores
        }
        return ScoreTable(
            np.concatenate([part.ids for part in parts]), scores, np.concatenate(labels)
        )

    def health(self) -> list[dict[str, Any]]:
        """Health of each shard."""
        import ray

        answers: list[dict[str, Any]] = ray.get([shard.health.remote() for shard in self.shards])
        return answers

    def close(self) -> None:
        """Stop the actors; may be called twice."""
        import ray

        for shard in self.shards:
            ray.kill(shard)
        self.shards = []


def split_ids(
    ids: NDArray[np.int64], shard_rows: int
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Cut the sorted ids into ranges; returns each range's first id and the ranges.

    Raises:
        ConfigError: no ids, or a shard of less than one row.
    """
    if len(ids) == 0 or shard_rows < 1:
        raise ConfigError("ids", len(ids), "at least one id, and shard_rows >= 1")
    ordered = np.sort(ids)
    parts = np.array_split(ordered, -(-len(ids) // shard_rows))
    return np.asarray([part[0] for part in parts], np.int64), parts


def route(batch: StatBatch, bounds: NDArray[np.int64]) -> list[tuple[int, StatBatch]]:
    """Split a batch by id range into (shard, part); parts keep the batch's place in the order."""
    owner = np.maximum(np.searchsorted(bounds, batch.ids, side="right") - 1, 0)
    parts = []
    for shard in np.unique(owner).tolist():
        mine = owner == shard
        columns = {
            name: getattr(batch, name)[mine]
            for name in ("ids", "labels", "margin", "p_true", "el2n", "right")
        }
        parts.append((shard, dataclasses.replace(batch, **columns)))
    return parts
