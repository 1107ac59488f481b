"""Embedding servers on Ray: the same bits as by direct calls, kills, saves, another shard count."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.fiited import EmbeddingShard, ShardGroup, ShardOptions
from actors.fiited.saves import complete
from actors.session import Session
from raysys.errors import RemoteError
from raysys.training.fiited import FiitedConfig, TableSpec
from raysys.training.fiited.sharding import (
    BucketMap,
    LocalTransport,
    ShardConfig,
    ShardCore,
    ShardedEmbedding,
)

TABLES = (TableSpec(name="a", dim=16, rows=400), TableSpec(name="b", dim=16, rows=90))
CONFIG = FiitedConfig(
    chunk=4, budget_slots=150, cadence="interval", interval=7, seed=5, page_bytes=65536
)


def batches(steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [
        np.stack([np.minimum(rng.zipf(1.2, 64), t.rows) for t in TABLES], 1) for _ in range(steps)
    ]


def step(layer: ShardedEmbedding, ids: np.ndarray) -> np.ndarray:
    out = layer(torch.from_numpy(ids))
    out.backward(torch.cos(torch.arange(out.numel())).reshape(out.shape) + 0.1 * out.detach())
    return np.asarray(out.detach().numpy())


def local() -> ShardedEmbedding:
    core = ShardCore(CONFIG, TABLES, ShardConfig(), BucketMap.even(1).owned(0))
    return ShardedEmbedding(CONFIG, TABLES, BucketMap.even(1), LocalTransport([core])).train()


def test_kills_saves_and_resharding_change_no_bit(ray_session: Session, tmp_path: Path) -> None:
    del ray_session
    expected = local()
    data = batches(34)
    outputs = [step(expected, ids) for ids in data]
    group = ShardGroup.start(CONFIG, TABLES, shards=2, root=str(tmp_path), cpus=0)
    layer = group.embedding().train()
    for index, ids in enumerate(data[:24]):
        if index == 5:  # before any save: the log brings the shard back from nothing
            ray.kill(group.shards[0], no_restart=False)
        if index == 15:  # after the save at exchange 11, over a round that happened since
            ray.kill(group.shards[1], no_restart=False)
        if index == 18:
            ray.kill(group.coordinator, no_restart=False)
        if index == 19:  # a round is due: the other shard waits in it until this one caught up,
            # which it does over earlier rounds with a coordinator that never saw them
            ray.kill(group.shards[0], no_restart=False)
        assert np.array_equal(step(layer, ids), outputs[index]), index
        if index == 11:
            saved = group.begin_save(layer.exchanges - 1)
        if index == 13:  # two steps passed while it was written
            assert group.end_save(saved)["exchange"] == 11
            layer.checkpointed(11)
    save = group.begin_save(layer.exchanges - 1)
    ray.get([shard.verify.remote() for shard in group.shards])
    group.end_save(save)
    assert len(complete(tmp_path)) == 2
    _loads(group.stats())
    group.close()
    group.close()
    wider = ShardGroup.start(CONFIG, TABLES, shards=3, root=str(tmp_path), cpus=0)
    resumed = wider.embedding().train()
    assert resumed.exchanges == 23
    for index in range(23, 34):
        assert np.array_equal(step(resumed, data[index]), outputs[index]), index
    wider.close()


class _Silent:
    """A coordinator that never answers."""

    class merge:  # noqa: N801 - stands for an actor's method
        @staticmethod
        async def remote(*_: Any) -> Any:
            await asyncio.Event().wait()


def test_a_shard_whose_round_was_lost_serves_nothing_more() -> None:
    options = ShardOptions(
        config=CONFIG,
        tables=TABLES,
        shard=ShardConfig(),
        owned=BucketMap.even(1).owned(0).tobytes(),
        step_timeout_s=0.05,
    )

    async def drive() -> None:
        shard = EmbeddingShard(options, _Silent())
        layer = local()
        requests = layer.transport.sent = []  # type: ignore[attr-defined]
        inner = layer.transport.exchange
        layer.transport.exchange = lambda r, recover: (requests.extend(r), inner(r, recover))[1]  # type: ignore[method-assign]
        for ids in batches(5):
            step(layer, ids)
        for request in requests[:3]:
            await shard.exchange(request)
        with pytest.raises(RemoteError, match="a shard is missing"):
            await shard.exchange(requests[3])
        for request in requests[3:5]:
            with pytest.raises(RemoteError, match="a round was lost"):
                await shard.exchange(request)

    asyncio.run(drive())


def _loads(stats: list[dict[str, Any]]) -> None:
    assert sum(s["loads"].sum() for s in stats) > 0
    assert all(s["wire_out"] > 0 for s in stats)
