"""Data order and views that an activation cache can live with.

A plain distributed sampler deals ids to other ranks in each epoch, so that a cache per machine
would miss; and a cached activation belongs to one augmented view of its example. Views are drawn by
a counter-based generator keyed by (seed, id, view), so the same view comes back every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.errors import ConfigError
from raysys.training.kgt.store import IntArray

Transform = Callable[[Tensor, np.random.Generator], Tensor]
VIEW_POLICIES = ("fixed", "k_views", "off")


class ShardStableSampler:
    """Rows of one rank, shuffled within it each epoch; an id stays with its rank.

    The shards are equal in size; up to ``world - 1`` rows are left out. Staying within a shard is a
    small bias against global shuffling; ``reshard_every`` deals anew after so many epochs (and the
    cache then misses for one epoch).
    """

    def __init__(
        self, rows: int, *, rank: int = 0, world: int = 1, seed: int = 0, reshard_every: int = 0
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError("rank", rank, f"0 to {world - 1}")
        if rows < world:
            raise ConfigError("rows", rows, f"at least one row for each of {world} ranks")
        self.rows = rows
        self.rank = rank
        self.world = world
        self.seed = seed
        self.reshard_every = reshard_every

    def shard(self, epoch: int) -> IntArray:
        """Rows of this rank in an epoch, unshuffled."""
        deal = epoch // self.reshard_every if self.reshard_every else 0
        order = np.random.default_rng([self.seed, deal]).permutation(self.rows)
        share = self.rows // self.world
        return np.sort(order[self.rank * share : (self.rank + 1) * share])

    def order(self, epoch: int) -> IntArray:
        """Rows of this rank in their order for an epoch."""
        shard = self.shard(epoch)
        return np.random.default_rng([self.seed, epoch, self.rank, 1]).permutation(shard)

    def batches(self, epoch: int, batch_size: int) -> Iterator[IntArray]:
        """The epoch's whole batches; a shorter last one is left out."""
        order = self.order(epoch)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def view_of(epoch: int, policy: str, views: int) -> int:
    """Which of the cached views an epoch uses.

    Raises:
        ConfigError: unknown policy.
    """
    if policy not in VIEW_POLICIES:
        raise ConfigError("view_policy", policy, "one of " + ", ".join(VIEW_POLICIES))
    return epoch % views if policy == "k_views" else 0


def cache_ids(ids: NDArray[np.int64], view: int, views: int) -> IntArray:
    """Cache keys of (id, view) pairs: ``id * views + view``."""
    keys: IntArray = np.asarray(ids, np.int64) * views + view
    return keys


def apply_view(
    transform: Transform, x: Tensor, ids: NDArray[np.int64], seed: int, view: int
) -> Tensor:
    """Augment a batch row by row with a generator keyed by (seed, id, view)."""
    rows = [
        transform(row, np.random.Generator(np.random.Philox(key=[seed, int(key) * 65_536 + view])))
        for row, key in zip(x, ids)
    ]
    return torch.stack(rows)


def check_repeatable(transform: Transform, x: Tensor, ids: NDArray[np.int64], seed: int) -> None:
    """Transform twice and compare: a cache is only right for a repeatable transform.

    Raises:
        ConfigError: the transform uses other randomness than the generator it is given.
    """
    first = apply_view(transform, x, ids, seed, 0)
    if not torch.equal(first, apply_view(transform, x, ids, seed, 0)):
        raise ConfigError(
            "transform", getattr(transform, "__name__", repr(transform)), "a repeatable transform",
            "Draw all randomness from the generator argument, or train without the cache",
        )  # fmt: skip
