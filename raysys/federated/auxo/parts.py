"""Parts of tables and states: rows of a round, arrays under a prefix, mixed weights, JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.federated.core.aggregation import ClientTable
from raysys.federated.core.messages import IntArray
from raysys.federated.core.strategy import StateArrays


def subset(table: ClientTable, rows: IntArray) -> ClientTable:
    """The table of some of a round's clients."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(ClientTable):
        column = getattr(table, field.name)
        columns[field.name] = None if column is None else column[rows]
    return ClientTable(**columns)


def averaged(mine: StateArrays, other: StateArrays, share: float) -> StateArrays:
    """Weights of two lines, ``share`` of the first, where their shapes agree."""
    return {
        name: (share * mine[name] + (1 - share) * value).astype(value.dtype)
        for name, value in other.items()
        if name.rpartition(".")[2] == "weights" and name in mine and mine[name].shape == value.shape
    }


def direction(change: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """A change of weights [P] at length 1; none stays none."""
    values = np.asarray(change, dtype=np.float64)
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-12))


def strip(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """Arrays under a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def plain(value: Any) -> Any:
    """A dataclass, or what is inside one, as JSON-ready values; NaN becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
