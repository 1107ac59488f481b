"""The score store: direct calls, routing, and on Ray a killed shard that loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.ccs.store import ScoreStoreActor, ShardedStore, route, split_ids
from actors.session import Session
from raysys.errors import ConfigError
from raysys.training.ccs.accumulator import ScoreAccumulator
from raysys.training.ccs.dynamics import StatBatch


def batch(epoch: int, ids: np.ndarray, sequence: int = 0) -> StatBatch:
    rng = np.random.default_rng([epoch, sequence])
    p = rng.random(len(ids)).astype(np.float32)
    return StatBatch(epoch, 0, sequence, ids, ids % 3, 2 * p - 1, p, 1 - p, p > 0.5)


def test_routing_splits_by_range_and_keeps_every_row() -> None:
    bounds, parts = split_ids(np.asarray([9, 1, 5, 3, 7]), 2)
    assert [part.tolist() for part in parts] == [[1, 3], [5, 7], [9]]
    assert bounds.tolist() == [1, 5, 9]
    routed = route(batch(4, np.asarray([7, 1, 9, 3])), bounds)
    assert [(shard, part.ids.tolist()) for shard, part in routed] == [
        (0, [1, 3]),
        (1, [7]),
        (2, [9]),
    ]
    assert {part.key for _, part in routed} == {(4, 0, 0)}
    with pytest.raises(ConfigError, match="at least one id"):
        split_ids(np.zeros(0, np.int64), 2)


def test_actor_restarts_from_its_snapshot(tmp_path: Path) -> None:
    ids, path = np.arange(6), str(tmp_path / "shard.parquet")
    first = ScoreStoreActor(ids, snapshot=path)
    first.add(batch(0, ids))
    assert first.commit(0) == 6
    first.add(batch(1, ids))
    first.close()
    first.close()
    assert first.health()["closed"]
    second = ScoreStoreActor(ids, snapshot=path)
    assert second.health()["committed_epoch"] == 0
    for actor in (first, second):
        actor.reopen(1)
        actor.add(batch(1, ids))
        actor.commit(1)
    np.testing.assert_array_equal(first.table().score("aum"), second.table().score("aum"))


def test_sharded_store_equals_one_accumulator_although_a_shard_is_killed(
    ray_session: Session, tmp_path: Path
) -> None:
    import ray

    ids = np.arange(40)
    rng = np.random.default_rng(0)
    alone = ScoreAccumulator(ids)
    store = ShardedStore(ids, snapshot_folder=str(tmp_path), shard_rows=15)
    for epoch in range(3):
        order = rng.permutation(ids)
        for sequence, part in enumerate(np.array_split(order, 4)):
            alone.add(batch(epoch, part, sequence))
            store.add(batch(epoch, part, sequence))
            if epoch == 1 and sequence == 1:
                store.settle()
                ray.kill(store.shards[1], no_restart=False)  # mid-epoch, batches in its memory
        assert alone.commit(epoch) == 40
        assert store.commit(epoch) == 40
    merged, wanted = store.table(), alone.to_table()
    np.testing.assert_array_equal(merged.ids, wanted.ids)
    for name, values in wanted.scores.items():
        np.testing.assert_array_equal(merged.scores[name], values)
    assert [entry["committed_epoch"] for entry in store.health()] == [2, 2, 2]
    store.add(batch(3, np.asarray([99])))
    with pytest.raises(ConfigError, match="known ids"):
        store.commit(3)
    store.close()
    store.close()
