"""Checks of what a batch brings: ids, bag offsets and per-sample weights."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.native import F32, I64


def check_ids(
    config: FiitedConfig, table: TableSpec, ids: npt.ArrayLike, *, dense: bool = False
) -> I64:
    """Ids of one table as int64.

    Raises:
        ConfigError: not one-dimensional integers, or out of range; names the table and position.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        remedy = "Hash strings with raysys.training.fiited.hash_strings"
        got = f"{array.dtype} of {array.ndim} dimensions"
        raise ConfigError(f"ids of {table.name}", got, "a 1-d integer array", remedy)
    if array.dtype.kind == "u":
        return np.ascontiguousarray(array.astype(np.uint64).view(np.int64))
    values = np.ascontiguousarray(array, np.int64)
    if (config.id_space == "signed" or dense) and values.min() < 0:
        position = int(np.argmax(values < 0))
        remedy = 'Set id_space="bits" to read negative ids as unsigned'
        got = f"{values[position]} at position {position}"
        raise ConfigError(f"ids of {table.name}", got, "ids of 0 or more", remedy)
    if dense and values.max() >= table.rows:
        raise ConfigError(f"ids of {table.name}", int(values.max()), f"below {table.rows}")
    return values


def check_offsets(
    sizes: list[int], offsets: list[npt.ArrayLike] | None, starts: I64
) -> tuple[I64 | None, int]:
    """Join the tables' bag offsets into one array over the joined ids.

    Args:
        sizes: ids of each table. offsets: integers[bags + 1] a table, or None for one id a bag.
        starts: int64[tables]: where each table's ids begin in the joined ids.

    Returns:
        int64 offsets of all tables' bags (None for one id a bag), and the number of bags a table.

    Raises:
        ConfigError: tables that disagree in bags, or offsets that are no partition of the ids.
    """
    if offsets is None:
        if len(set(sizes)) > 1:
            got = sorted(set(sizes))
            raise ConfigError("values", got, "the same number of ids in every table")
        return None, sizes[0] if sizes else 0
    if len(offsets) != len(sizes):
        raise ConfigError("offsets", len(offsets), f"offsets for {len(sizes)} tables")
    tables = [_full_offsets(i, np.asarray(o), sizes[i]) for i, o in enumerate(offsets)]
    if len({len(table) for table in tables}) > 1:
        raise ConfigError("offsets", [len(t) for t in tables], "the same number of bags each")
    return np.concatenate([t + starts[i] for i, t in enumerate(tables)]), len(tables[0]) - 1


def split_offsets(
    cuts: npt.NDArray[Any], size: int, tables: int
) -> tuple[list[tuple[int, int]], list[npt.NDArray[Any]]]:
    """Tables out of the offsets of all tables' bags in one array (TorchRec's and FBGEMM's layout).

    Args:
        cuts: integers[tables * bags + 1], over the values of all tables.
        size: how many values there are.

    Returns:
        First and last position of each table's values, and integers[bags + 1] within each table.

    Raises:
        ConfigError: not as many bags for every table, or offsets that do not cut up the values.
    """
    bags, rest = divmod(len(cuts) - 1, tables) if cuts.ndim == 1 else (0, 1)
    if rest or cuts.dtype.kind not in "iu":
        got = f"{cuts.dtype} {cuts.shape}"
        raise ConfigError("offsets", got, f"integers, as many bags for each of {tables} tables")
    firsts = [*(cuts[:-1:bags].tolist() if bags else [0] * tables), size]
    if firsts[0] != 0 or sorted(firsts) != firsts:
        raise ConfigError("offsets", firsts, "a first offset of 0, then non-decreasing ones")
    parts = [cuts[t * bags : (t + 1) * bags + 1] - firsts[t] for t in range(tables)]
    return list(itertools.pairwise(firsts)), parts


def _full_offsets(index: int, offsets: npt.NDArray[Any], size: int) -> I64:
    field = f"offsets[{index}]"
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) == 0:
        raise ConfigError(field, f"{offsets.dtype} {offsets.shape}", "1-d integers, not empty")
    full = offsets.astype(np.int64)
    if full[0] != 0:
        raise ConfigError(field, int(full[0]), "a first offset of 0")
    if np.any(np.diff(full) < 0):
        raise ConfigError(field, "decreasing values", "non-decreasing offsets")
    if full[-1] != size:
        raise ConfigError(field, int(full[-1]), f"a last offset of {size}, the number of ids")
    return full


def check_weights(sizes: list[int], weights: list[npt.ArrayLike] | None) -> F32 | None:
    """Join the tables' per-sample weights to float32, as many as ids, all finite.

    Raises:
        ConfigError: another shape than the ids', or a weight that is not finite.
    """
    if weights is None:
        return None
    arrays = [np.asarray(w, np.float32) for w in weights]
    if [w.shape for w in arrays] != [(size,) for size in sizes]:
        shapes = [w.shape for w in arrays]
        raise ConfigError("per_sample_weights", shapes, f"shapes {[(size,) for size in sizes]}")
    joined = np.ascontiguousarray(np.concatenate(arrays))
    if not np.isfinite(joined).all():
        position = int(np.argmin(np.isfinite(joined)))
        got = f"{joined[position]} at position {position}"
        raise ConfigError("per_sample_weights", got, "finite weights")
    return joined
