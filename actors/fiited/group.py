"""A group of embedding servers: start, connect, save, close."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.fiited.journal import new_journal
from actors.fiited.rounds import RoundCoordinator
from actors.fiited.saves import commit, latest_exchange, partial_folder
from actors.fiited.shard import EmbeddingShard, ShardOptions
from actors.fiited.transport import RayTransport
from raysys.errors import RemoteError
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.sharding import BucketMap, ShardConfig, ShardedEmbedding
from raysys.training.fiited.sharding.messages import Wire
from raysys.training.fiited.sharding.rounds import churn_of
from raysys.training.fiited.sharding.shard import shard_config


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A save whose state is fixed and whose files are being written."""

    exchange: int
    answers: list[Any]


class ShardGroup:
    """Shards as actors, and how trainers reach them. Plain data: it may travel to the trainers."""

    def __init__(
        self, config: FiitedConfig, tables: tuple[TableSpec, ...], buckets: BucketMap,
        shards: list[Any], coordinator: Any, root: str, wire: Wire,
    ) -> None:  # fmt: skip
        self.config, self.tables, self.buckets = config, tables, buckets
        self.shards, self.coordinator, self.root, self.wire = shards, coordinator, root, wire

    @classmethod
    def start(
        cls,
        config: FiitedConfig,
        tables: tuple[TableSpec, ...],
        *,
        shards: int,
        workers: int = 1,
        root: str = "",
        wire: Wire = "fp32",
        cpus: float = 1.0,
        step_timeout_s: float = 60.0,
    ) -> ShardGroup:
        """Start the actors; with saves under ``root`` they load the newest, whatever its shards.

        Actors restart without limit: a restarted shard loads the newest save and the trainers'
        logs bring it to their step.

        Args:
            cpus: logical CPUs per shard.

        Raises:
            ConfigError: what several shards cannot share (see ``shard_config``).
            RemoteError: a shard could not start or load.
        """
        buckets = BucketMap.even(shards)
        one = ShardConfig(index=0, shards=shards, workers=workers, wire=wire)
        churn = churn_of(shard_config(config, one, tables, 1.0))
        coordinator = ray.remote(RoundCoordinator).options(
            num_cpus=0, max_restarts=-1, max_concurrency=1000
        ).remote(shards, churn, new_journal(root))  # fmt: skip
        server = ray.remote(EmbeddingShard)
        actors = [
            server.options(num_cpus=cpus, max_restarts=-1, max_concurrency=1000).remote(
                ShardOptions(
                    config=config,
                    tables=tables,
                    shard=ShardConfig(index=i, shards=shards, workers=workers, wire=wire),
                    owned=buckets.owned(i).tobytes(),
                    root=root,
                    step_timeout_s=step_timeout_s,
                ),
                coordinator,
            )
            for i in range(shards)
        ]
        group = cls(config, tables, buckets, actors, coordinator, root, wire)
        try:
            ray.get([actor.health.remote() for actor in actors])
        except ray.exceptions.RayActorError as error:
            group.close()
            raise RemoteError("an embedding shard", str(error), "See Ray's worker logs") from error
        return group

    def embedding(
        self, *, worker: int = 0, share: float = 1.0, loss_scale: float = 1.0
    ) -> ShardedEmbedding:
        """The layer of one trainer; it starts after the newest save's exchange."""
        layer = ShardedEmbedding(
            self.config, self.tables, self.buckets, RayTransport(self.shards), worker=worker,
            share=share, loss_scale=loss_scale, wire=self.wire,
        )  # fmt: skip
        layer.exchanges = max(0, latest_exchange(Path(self.root))) if self.root else 0
        return layer

    def begin_save(self, exchange: int) -> PendingSave:
        """Fix the state after an exchange; call it before the next exchange is sent."""
        folder = str(partial_folder(Path(self.root), exchange))
        return PendingSave(exchange, [s.save.remote(folder, exchange) for s in self.shards])

    def end_save(self, save: PendingSave) -> dict[str, Any]:
        """Wait for the files and make the save the newest one.

        Raises:
            RemoteError: a shard failed meanwhile; the previous save stays the newest.
        """
        try:
            found = ray.get(save.answers)
        except ray.exceptions.RayActorError as error:
            raise RemoteError("an embedding shard", str(error), "Save again") from error
        commit(Path(self.root), save.exchange, [f["alive"] for f in found])
        self.coordinator.forget.remote(min(f["round"] for f in found))
        return {
            "exchange": save.exchange,
            "pause_s": max(f["pause_s"] for f in found),
            "bytes": sum(f["bytes"] for f in found),
        }

    def stats(self) -> list[dict[str, Any]]:
        """Counters of every shard."""
        return list(ray.get([shard.stats.remote() for shard in self.shards]))

    def close(self) -> None:
        """Stop the actors; may be called twice."""
        for actor in [*self.shards, self.coordinator]:
            ray.kill(actor, no_restart=True)
        self.shards = []
