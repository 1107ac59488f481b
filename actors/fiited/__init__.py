"""Sharded FIITED tables as Ray actors: shards, the coordinator of their rounds, the transport."""

from __future__ import annotations

from actors.fiited.group import ShardGroup
from actors.fiited.shard import EmbeddingShard, ShardOptions
from actors.fiited.transport import RayTransport

__all__ = ["EmbeddingShard", "RayTransport", "ShardGroup", "ShardOptions"]
