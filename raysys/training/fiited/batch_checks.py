"""Checks of what a batch brings besides ids: bag offsets and per-sample weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.training.fiited.native import F32, I64


def check_offsets(
    ids: list[I64], offsets: list[npt.ArrayLike] | None, starts: I64
) -> tuple[I64 | None, int]:
    """Join the tables' bag offsets into one array over the joined ids.

    Args:
        ids: int64[n_t] a table. offsets: integers[bags + 1] a table, or None for one id a bag.
        starts: int64[tables]: where each table's ids begin in the joined ids.

    Returns:
        int64 offsets of all tables' bags (None for one id a bag), and the number of bags a table.

    Raises:
        ConfigError: tables that disagree in bags, or offsets that are no partition of the ids.
    """
    if offsets is None:
        sizes = {len(table) for table in ids}
        if len(sizes) > 1:
            raise ConfigError("values", sorted(sizes), "the same number of ids in every table")
        return None, sizes.pop() if sizes else 0
    if len(offsets) != len(ids):
        raise ConfigError("offsets", len(offsets), f"offsets for {len(ids)} tables")
    tables = [_full_offsets(i, np.asarray(o), len(ids[i])) for i, o in enumerate(offsets)]
    if len({len(table) for table in tables}) > 1:
        raise ConfigError("offsets", [len(t) for t in tables], "the same number of bags each")
    return np.concatenate([t + starts[i] for i, t in enumerate(tables)]), len(tables[0]) - 1


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


def check_weights(ids: list[I64], weights: list[npt.ArrayLike] | None) -> F32 | None:
    """Join the tables' per-sample weights to float32, shapes as the ids', all finite.

    Raises:
        ConfigError: another shape than the ids', or a weight that is not finite.
    """
    if weights is None:
        return None
    arrays = [np.asarray(w, np.float32) for w in weights]
    if [w.shape for w in arrays] != [i.shape for i in ids]:
        shapes = [w.shape for w in arrays]
        raise ConfigError("per_sample_weights", shapes, f"shapes {[i.shape for i in ids]}")
    joined = np.ascontiguousarray(np.concatenate(arrays))
    if not np.isfinite(joined).all():
        position = int(np.argmin(np.isfinite(joined)))
        got = f"{joined[position]} at position {position}"
        raise ConfigError("per_sample_weights", got, "finite weights")
    return joined
