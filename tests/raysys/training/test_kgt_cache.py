"""The activation cache's files, its faults, shards and repeatable views."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raysys.errors import ConfigError, StorageError
from raysys.training.kgt.cache import ActivationCache
from raysys.training.kgt.config import CacheConfig
from raysys.training.kgt.sampling import (
    ShardStableSampler,
    apply_view,
    cache_ids,
    check_repeatable,
    view_of,
)
from raysys.training.kgt.store import BoundaryStore, StoreKey


def key(**changes: Any) -> StoreKey:
    base: dict[str, Any] = {
        "boundary": 1, "version": 0, "shape": (2, 3), "dtype": "fp32", "fingerprint": "a",
    }  # fmt: skip
    return StoreKey(**{**base, **changes})


def test_rows_come_back_and_only_written_ones_are_hits(tmp_path: Path) -> None:
    ids = np.array([3, 8, 10**12], np.int64)
    store = BoundaryStore(tmp_path, key(), ids)
    rows = torch.arange(6.0).reshape(1, 2, 3)
    store.write(store.slots(np.array([8])), rows)
    slots = store.slots(np.array([3, 8, 9, 10**12]))
    assert slots.tolist() == [0, 1, -1, 2]
    assert store.hits(slots).tolist() == [False, True, False, False]
    assert torch.equal(store.read(slots[1:2]), rows)
    again = BoundaryStore(tmp_path, key(), ids)
    assert again.hits(slots).tolist() == [False, True, False, False]


@pytest.mark.parametrize("changes", [{"fingerprint": "b"}, {"augmentation": "flip"}])
def test_rows_of_another_data_set_are_dropped(tmp_path: Path, changes: dict[str, Any]) -> None:
    ids = np.arange(4)
    one = BoundaryStore(tmp_path, key(), ids)
    one.write(np.array([0]), torch.ones(1, 2, 3))
    two = BoundaryStore(tmp_path, key(**changes), ids)
    assert not two.hits(np.array([0])).any()


def test_a_full_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        BoundaryStore(tmp_path, key(), np.arange(4))
    assert not list(tmp_path.glob("boundary*"))


def test_a_full_disk_turns_the_cache_off_and_rows_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ActivationCache(CacheConfig(directory=str(tmp_path)), np.arange(4), "a")
    cache.move(1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    x = torch.ones(4, 2)
    out = cache.gather(np.arange(4), [x], lambda inputs, upto, h, start: 2 * inputs[0])
    assert torch.equal(out, 2 * x)
    assert "No space left" in cache.off_reason
    cache.close()
    cache.close()


def test_fp16_overflow_changes_the_precision_of_that_boundary(tmp_path: Path) -> None:
    cache = ActivationCache(CacheConfig(directory=str(tmp_path)), np.arange(4), "a")
    cache.move(1)
    x = torch.full((4, 2), 1e6)
    for _ in range(2):
        out = cache.gather(np.arange(4), [x], lambda inputs, upto, h, start: inputs[0])
        assert torch.isfinite(out).all()
        assert float(out[0, 0]) == pytest.approx(1e6, rel=0.01)
    cache.close()


def test_unfreezing_forgets_and_the_directory_is_free_after_closing(tmp_path: Path) -> None:
    config = CacheConfig(directory=str(tmp_path), pays_below=1e9)
    cache = ActivationCache(config, np.arange(4), "a")
    compute: Any = lambda inputs, upto, h, start: inputs[0]  # noqa: E731
    cache.move(2)
    cache.gather(np.arange(4), [torch.ones(4, 2)], compute)
    cache.gather(np.arange(4), [torch.ones(4, 2)], compute)
    assert cache.stats.hits == 4
    cache.move(1)
    assert cache.used_bytes == 0
    cache.gather(np.arange(4), [torch.ones(4, 2)], compute)
    assert cache.stats.misses == 8
    with pytest.raises(StorageError, match="used by another job"):
        ActivationCache(config, np.arange(4), "a")
    cache.close()
    ActivationCache(config, np.arange(4), "a").close()
    assert not list(tmp_path.glob("boundary*"))


def doubled(inputs: Any, upto: int, h: Tensor | None, start: int) -> Tensor:
    return 2 * inputs[0]


def killed(cache: ActivationCache) -> None:
    """Leave the files as a killed process does."""
    cache._lock.close()


def test_rows_that_a_checkpoint_describes_outlive_a_release(tmp_path: Path) -> None:
    ids, x = np.arange(4), torch.ones(4, 2)
    config = CacheConfig(directory=str(tmp_path))
    cache = ActivationCache(config, ids, "a")
    cache.move(1)
    cache.gather(ids, [x], doubled)
    state = cache.state_dict()
    cache.move(0)  # and killed before the next checkpoint
    killed(cache)
    resumed = ActivationCache(config, ids, "a")
    resumed.load_state_dict(state)
    resumed.gather(ids, [x], doubled)
    assert resumed.stats.hits == 4
    resumed.move(0)
    resumed.state_dict()  # may not reach the disk
    assert list(tmp_path.glob("boundary*"))
    resumed.state_dict()
    assert not list(tmp_path.glob("boundary*"))
    resumed.close()


def test_rows_that_a_killed_job_left_are_never_read_by_another(tmp_path: Path) -> None:
    ids, x = np.arange(4), torch.ones(4, 2)
    config = CacheConfig(directory=str(tmp_path))
    other = ActivationCache(config, ids, "a")
    other.move(1)
    other.gather(ids[:2], [x[:2]], lambda inputs, upto, h, start: 5 * inputs[0])
    killed(other)
    cache = ActivationCache(config, ids, "a")
    cache.move(1)
    assert torch.equal(cache.gather(ids, [x], doubled), 2 * x)
    assert torch.equal(cache.gather(ids, [x], doubled), 2 * x)
    assert cache.active
    cache.close()


def test_a_cache_that_does_not_pay_is_paused(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    config = CacheConfig(directory=str(tmp_path), pays_below=0.8)
    cache = ActivationCache(config, np.arange(8), "a", clock=lambda: float(next(ticks)))
    cache.move(1)
    for start in (0, 2, 4):
        ids = np.arange(start, start + 2)
        cache.gather(ids, [torch.ones(2, 2)], lambda inputs, upto, h, at: inputs[0])
    assert not cache.active
    cache.close()


def test_shards_are_disjoint_stable_and_shuffled() -> None:
    samplers = [ShardStableSampler(103, rank=rank, world=4, seed=7) for rank in range(4)]
    shards = [set(s.shard(0).tolist()) for s in samplers]
    assert sum(map(len, shards)) == len(set.union(*shards)) == 100
    assert set(samplers[1].order(5).tolist()) == shards[1]
    assert samplers[1].order(5).tolist() != samplers[1].order(6).tolist()
    dealt = ShardStableSampler(103, rank=1, world=4, seed=7, reshard_every=2)
    assert set(dealt.shard(1).tolist()) == shards[1]
    assert set(dealt.shard(2).tolist()) != shards[1]
    with pytest.raises(ConfigError, match="rank"):
        ShardStableSampler(10, rank=4, world=4)


def test_views_repeat_and_random_transforms_are_found_out() -> None:
    x, ids = torch.zeros(3, 4), np.array([5, 6, 7])

    def good(row: Tensor, rng: np.random.Generator) -> Tensor:
        return row + float(rng.standard_normal())

    def bad(row: Tensor, rng: np.random.Generator) -> Tensor:
        return row + torch.rand(1)

    one = apply_view(good, x, ids, 1, 0)
    assert torch.equal(one, apply_view(good, x, ids, 1, 0))
    assert not torch.equal(one, apply_view(good, x, ids, 1, 1))
    check_repeatable(good, x, ids, 1)
    with pytest.raises(ConfigError, match="repeatable"):
        check_repeatable(bad, x, ids, 1)
    assert [view_of(epoch, "k_views", 3) for epoch in range(4)] == [0, 1, 2, 0]
    assert view_of(9, "fixed", 3) == 0
    assert cache_ids(ids, 1, 3).tolist() == [16, 19, 22]
    with pytest.raises(ConfigError, match="view_policy"):
        view_of(1, "some", 2)
