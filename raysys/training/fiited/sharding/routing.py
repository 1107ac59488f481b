"""Which shard owns a row, and which distinct rows a batch needs from every shard.

The top 12 bits of a virtual row are its bucket; a versioned map gives buckets to shards. Adding a
shard moves whole buckets, rows are never hashed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.ops import fiited_abi as abi
from raysys.ops.fiited_arithmetic import mix_array
from raysys.training.fiited.batch_checks import check_ids
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.native import I64, U16, U32, U64
from raysys.training.fiited.store import table_seed


@dataclass(frozen=True, slots=True)
class BucketMap:
    """Owner of each of the 4,096 buckets, and the version of the assignment."""

    epoch: int
    owners: npt.NDArray[np.uint16]

    @classmethod
    def even(cls, shards: int, epoch: int = 0) -> BucketMap:
        """Contiguous ranges of nearly equal size.

        Raises:
            ConfigError: no shard, or more than buckets.
        """
        if not 1 <= shards <= abi.BUCKETS:
            raise ConfigError("shards", shards, f"1 to {abi.BUCKETS}")
        owners = np.arange(abi.BUCKETS) * shards // abi.BUCKETS
        return cls(epoch, owners.astype(np.uint16))

    @property
    def shards(self) -> int:
        return int(self.owners.max()) + 1

    def owned(self, shard: int) -> npt.NDArray[np.uint8]:
        """1 for every bucket of a shard, u8[4096]."""
        return np.asarray(self.owners == shard, np.uint8)

    def balanced(self, loads: npt.NDArray[np.float64], limit: float = 1.25) -> BucketMap:
        """Move the hottest buckets of shards above ``limit`` times the mean to the coolest shard.

        Args:
            loads: traffic of every bucket, [4096].

        Returns:
            The same map if no shard is above the limit, else one of the next version.
        """
        owners = self.owners.copy()
        totals = np.bincount(owners, weights=loads, minlength=self.shards)
        mean = totals.mean()
        for bucket in np.argsort(-loads):
            hot = int(np.argmax(totals))
            if totals[hot] <= limit * mean:
                break
            cool = int(np.argmin(totals))
            if owners[bucket] == hot and totals[cool] + loads[bucket] < totals[hot]:
                owners[bucket] = cool
                totals[hot] -= loads[bucket]
                totals[cool] += loads[bucket]
        if np.array_equal(owners, self.owners):
            return self
        return BucketMap(self.epoch + 1, owners)


@dataclass(frozen=True, slots=True)
class Routed:
    """Distinct rows of a batch in order of appearance, table by table.

    Args:
        keys, tables, counts: one entry per distinct row.
        inverse: for every value of the batch, its row; values of all tables joined.
        columns: for every value, its table.
        shards: owner of every row.
        epoch: version of the bucket map used.
    """

    keys: U64
    tables: U16
    counts: U32
    inverse: I64
    columns: I64
    shards: npt.NDArray[np.uint16]
    epoch: int


class Router:
    """Turns ids into rows and owners; needs no store."""

    def __init__(
        self, config: FiitedConfig, tables: tuple[TableSpec, ...], buckets: BucketMap
    ) -> None:
        self.config, self.tables, self.buckets = config, tables, buckets
        self.seeds = [np.uint64(table_seed(config, i, t)) for i, t in enumerate(tables)]

    def route(self, values: list[npt.ArrayLike]) -> Routed:
        """Distinct rows and their owners.

        Raises:
            ConfigError: ids that are not integers, or negative ones.
        """
        if len(values) != len(self.tables):
            raise ConfigError("values", len(values), f"ids for {len(self.tables)} tables")
        keys, tables, counts, inverses, columns = [], [], [], [], []
        base = 0
        for index, (table, given) in enumerate(zip(self.tables, values)):
            ids = check_ids(self.config, table, given)
            rows = self._rows(index, ids)
            unique, first, inverse, count = np.unique(
                rows, return_index=True, return_inverse=True, return_counts=True
            )
            order = np.argsort(first)
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            keys.append(unique[order])
            counts.append(count[order])
            inverses.append(rank[inverse] + base)
            tables.append(np.full(len(unique), index, np.uint16))
            columns.append(np.full(len(ids), index, np.int64))
            base += len(unique)
        joined = np.concatenate(keys)
        return Routed(
            joined,
            np.concatenate(tables),
            np.concatenate(counts).astype(np.uint32),
            np.concatenate(inverses).astype(np.int64),
            np.concatenate(columns),
            self.buckets.owners[(joined >> np.uint64(52)).astype(np.int64)],
            self.buckets.epoch,
        )

    def _rows(self, index: int, ids: I64) -> U64:
        seed, limit = self.seeds[index], self.tables[index].virtual_rows
        rows = mix_array(ids.view(np.uint64) ^ seed)
        return mix_array((rows % np.uint64(limit)) ^ seed) if limit else rows
