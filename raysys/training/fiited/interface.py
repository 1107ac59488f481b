"""The C interface of ``kernels/fiited_store.cpp``: types of its functions, and its answers."""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

from raysys.errors import ConfigError, DataError, InfeasibleError, RaysysError
from raysys.ops import fiited_abi as abi

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64
_SIGNATURES: dict[str, list[Any]] = {
    "fiited_lookup": [_P, _P, _P, _P, _P, _I64, _I32, _P, _I32, _F32, _P, _I64, _P],
    "fiited_update": [_P, _P, _P, _I64, _F32, _F32, _I32],
    "fiited_end_step": [_P, _I64, _I64],
    "fiited_round": [_P],
    "fiited_compact": [_P, _I64],
    "fiited_histogram": [_P, _P],
    "fiited_collect": [_P, _U32, _U64, _P, _P, _I64],
    "fiited_plan": [_P, _F32, _U64, _U64, _P],
    "fiited_planned": [_P, _I32, _P, _P],
    "fiited_apply": [_P, _I64, _I64, _I64],
    "fiited_elsewhere": [_P, _I64],
    "fiited_queue": [_P, _I32, _P, _I64],
    "fiited_set_budget": [_P, _I64, _I64],
    "fiited_freeze": [_P],
    "fiited_max_slots": [_P],
    "fiited_counters": [_P, _P],
    "fiited_verify": [_P],
    "fiited_rows_seen": [_P, _I32, _P],
    "fiited_shape": [_P, _P, _P],
    "fiited_lengths_by_use": [_P, _P],
    "fiited_inspect": [_P, _I32, _P, _I64, _P, _P, _P],
    "fiited_pin": [_P, _I32, _P, _I64, _I32],
    "fiited_pull": [_P, _P, _P, _I64, _I32, _P, _P],
    "fiited_push": [_P, _P, _P, _P, _P, _P, _P, _I64, _F32, _F32],
    "fiited_count": [_P, _U64, _U64, _P],
    "fiited_export": [_P, _U64, _U64, _P, _P, _P, _I64],
    "fiited_import": [_P, _P, _P, _P, _I64, _P],
    "fiited_clock": [_P, _I32, _P, _P, _P],
    "fiited_sketch": [_P, _I32, _P, _I64],
    "fiited_history": [_P, _I32, _P, _P, _P],
    "fiited_batch_rows": [_P],
}


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions declared."""
    library.fiited_create.argtypes = [_P, _P]
    library.fiited_create.restype = _P
    library.fiited_batch_create.argtypes = []
    library.fiited_batch_create.restype = _P
    for name in ("fiited_destroy", "fiited_batch_destroy"):
        getattr(library, name).argtypes = [_P]
        getattr(library, name).restype = None
    for name in ("fiited_virtual_rows", "fiited_raw_ids"):
        getattr(library, name).argtypes = [_P, _P, _I64, _P]
        getattr(library, name).restype = None
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = _I64
    return library


def raise_status(status: int) -> NoReturn:
    """Turn a negative answer of the C interface into a typed error."""
    if status == abi.FORKED:
        raise ConfigError("store", "a forked child", "the process that created the store")
    if status == abi.BAD_HANDLE:
        raise ConfigError("store", "closed", "an open store")
    if status == abi.USED:
        raise ConfigError("backward", "a second backward", "one backward per lookup")
    if status == abi.FROZEN:
        reason = "a frozen store, or a lookup made in evaluation mode"
        raise ConfigError("update", reason, "a training lookup on a store that is not frozen")
    if status == abi.NON_FINITE:
        reason = "NaN or infinity in the gradient; the step was rejected"
        raise ConfigError("gradient", "NaN or infinity", "finite values", reason)
    if status == abi.PINNED_OVER_BUDGET:
        reason = "the pinned rows alone need more chunks"
        raise InfeasibleError("the budget", reason, "Unpin rows or raise the budget")
    if status == abi.NO_MEMORY:
        raise InfeasibleError("the request", "the pool is full", "Raise the budget")
    if status == abi.DUPLICATE:
        raise DataError("rows to load", "a row is there already", "Load into an empty store")
    raise RaysysError(f"the compiled store answered status {status}")
