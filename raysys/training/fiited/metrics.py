"""What a store tells about itself: bytes by part, both pruning ratios, lengths and columns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.training.fiited.store import FiitedStore


def statistics(store: FiitedStore) -> dict[str, float]:
    """Flat numbers for a metrics log.

    ``rho`` is 1 - alive chunks / (chunks of all rows seen), as published numbers count it;
    ``rho_bytes`` is the same in real bytes, index and sketch included. Rows seen are estimated
    (HyperLogLog of 4,096 registers, standard error 1.6%), resident rows are exact.
    """
    counters: dict[str, float] = store.engine.counters()
    mapped = mapped_bytes(store)
    live = counters["pool_live"]
    mapped_pool = counters["pool_mapped"]
    result = counters | {
        "mapped_bytes": mapped,
        "fragmentation": 1 - live / mapped_pool if mapped_pool else 0.0,
        "hit_rate": counters["hits"] / max(counters["lookups"], 1),
    }
    if store.dense:
        return result
    chunks = full_bytes = rows_seen = 0.0
    for index, table in enumerate(store.tables):
        seen = seen_rows(store, index)
        k = table.dim // store.config.chunk
        rows_seen += seen
        chunks += seen * k
        full_bytes += seen * full_row_bytes(store, table.dim)
        if table.virtual_rows:
            pairs = seen * (seen - 1) / (2 * table.virtual_rows)
            result["collisions"] = result.get("collisions", 0.0) + pairs
    result["rows_seen"] = rows_seen
    result["rho"] = 1 - counters["alive"] / chunks if chunks else 0.0
    result["rho_bytes"] = 1 - mapped / full_bytes if full_bytes else 0.0
    return result


def mapped_bytes(store: FiitedStore) -> int:
    """Real bytes: pool pages, directory, sketch and scratch of the store."""
    counters = store.engine.counters()
    names = ("pool_mapped", "directory_bytes", "sketch_bytes", "scratch_bytes")
    return int(sum(counters[name] for name in names))


def full_row_bytes(store: FiitedStore, dim: int) -> int:
    """Bytes of an unpruned row with its optimizer state, without any index."""
    rowwise = 4 if store.config.optimizer == "rowwise_adagrad" else 0
    return dim * 4 * (1 + store.config.states) + rowwise


def seen_rows(store: FiitedStore, table: int) -> float:
    """Estimated number of distinct rows of a table that ever arrived."""
    lengths, _ = store.engine.shape()
    resident = float(lengths[table].sum())
    if not hasattr(store.engine, "rows_seen"):
        return resident
    return max(hyperloglog(store.engine.rows_seen(table)), resident)


def hyperloglog(registers: npt.NDArray[np.uint8]) -> float:
    """Cardinality estimate with the small-range correction of Flajolet et al. (2007)."""
    m = len(registers)
    raw = 0.7213 / (1 + 1.079 / m) * m * m / float(np.sum(2.0 ** -registers.astype(np.float64)))
    zeros = int(np.count_nonzero(registers == 0))
    return m * math.log(m / zeros) if raw <= 2.5 * m and zeros else raw


def shapes(store: FiitedStore) -> dict[str, Any]:
    """Per table: rows by length (in chunks) and the share of resident rows that keep a column."""
    lengths, columns = store.engine.shape()
    return {
        table.name: {
            "rows_by_length": [int(x) for x in lengths[index]],
            "kept_by_column": [
                float(x) / max(int(lengths[index].sum()), 1) for x in columns[index]
            ],
        }
        for index, table in enumerate(store.tables)
    }
