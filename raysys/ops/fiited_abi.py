"""Layout of the data that crosses the C interface of ``kernels/fiited_store.cpp``.

The structures mirror ``kernels/fiited_types.h`` and ``fiited_core.h`` field by field. The compiled
store and the reference store take the same ones, so a test can hand both the same set-up.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

MIXER = 0xD6E8FEB86659FD93
GOLDEN = 0x9E3779B97F4A7C15
MAX_CHUNKS = 15
PINNED = 0x8000
ALIVE_MASK = 0x7FFF
BINS = 32768
BUCKETS = 4096
HISTORY = 11  # totals of fiited_history

LAYOUTS = {"slabs": 0, "chunked": 1, "dense": 2}
OPTIMIZERS = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 2, "adam": 3}
OPTIMIZER_STATES = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 2}
UTILITIES = {"freq_grad": 0, "grad": 1, "freq": 2, "saliency": 3}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
INITS = {"uniform": 0, "constant": 1, "normal": 2, "zeros": 3}

# Negative answers of the C interface.
BAD_HANDLE, FORKED, USED, NO_MEMORY, CORRUPT = -1, -2, -3, -4, -5
NON_FINITE, FROZEN, PINNED_OVER_BUDGET, BAD_ARGUMENT, DUPLICATE = -6, -7, -8, -9, -10

ENTRY = np.dtype(
    [
        ("key", "<u8"),
        ("slot", "<u4"),
        ("acc", "<f4"),
        ("alive", "<u2"),
        ("table", "<u2"),
        ("grown", "<u2"),
        ("unused", "<u2"),
        ("touched", "<u4"),
        ("updates", "<u4"),
    ]
)

CANDIDATE = np.dtype(
    {
        "names": ["key", "score", "table"],
        "formats": ["<u8", "<f4", "<u2"],
        "offsets": [0, 8, 12],
        "itemsize": 16,
    }
)


def _int_fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class StoreConfig(ctypes.Structure):
    """``fiited::Config``."""

    _fields_ = [
        *_int_fields(
            "tables chunk max_chunks layout optimizer utility lifo admit_after min_alive init"
            " poison by_table half",
            ctypes.c_int32,
        ),
        *_int_fields("slots page_bytes sketch_cells budget_bytes", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        *_int_fields(
            "frequency_power exploration gamma hysteresis churn_cap slack eps beta1 beta2"
            " weight_decay clip acc0 init_scale",
            ctypes.c_float,
        ),
    ]


class TableConfig(ctypes.Structure):
    """``fiited::TableConfig``."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("virtual_rows", ctypes.c_uint64),
        ("dense_rows", ctypes.c_int64),
        ("chunks", ctypes.c_int32),
        ("weight", ctypes.c_float),
    ]


class Counters(ctypes.Structure):
    """``fiited::Counters``."""

    _fields_ = [
        *_int_fields(
            "steps round rows alive admitted removed grown evicted refused regret nonfinite"
            " lookups hits sketch_hits sketch_misses pool_mapped pool_live directory_bytes"
            " sketch_bytes scratch_bytes mapped_peak segments probes_total probes_max queue pinned",
            ctypes.c_int64,
        ),
        *_int_fields("scale cut_score window_weight", ctypes.c_double),
    ]

    def as_dict(self) -> dict[str, float]:
        """Names and values as plain numbers."""
        return {name: getattr(self, name) for name, *_ in self._fields_}
