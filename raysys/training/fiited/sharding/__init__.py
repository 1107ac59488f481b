"""One store over several shards: routing, ragged messages, one exchange per shard and step.

Everything here is pure: the classes run in one process by direct calls (:class:`LocalTransport`) or
behind actors, with the same bits either way.
"""

from __future__ import annotations

from raysys.training.fiited.sharding.embedding import LocalTransport, ShardedEmbedding, Transport
from raysys.training.fiited.sharding.messages import Push, Refusal, Reply, Request
from raysys.training.fiited.sharding.routing import BucketMap, Router
from raysys.training.fiited.sharding.shard import ShardConfig, ShardCore

__all__ = [
    "BucketMap",
    "LocalTransport",
    "Push",
    "Refusal",
    "Reply",
    "Request",
    "Router",
    "ShardConfig",
    "ShardCore",
    "ShardedEmbedding",
    "Transport",
]
