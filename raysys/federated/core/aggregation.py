"""Folds the partial sums of a round: streaming, in float64, each task counted once.

Sums are associative, so any tree of partial sums will do; to make a round reproducible to the bit
we fold in the order of task numbers and hold back what arrives early.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.messages import IntArray, Partial, Status

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(slots=True)
class ModelSum:
    """Running sums of one model: update [P], weight, and q-FedAvg's denominator."""

    delta: FloatArray
    weight: float = 0.0
    scalar: float = 0.0
    clients: int = 0

    def mean(self) -> FloatArray:
        """Weighted mean of the updates; zeros where nothing came."""
        return self.delta / self.weight if self.weight > 0 else np.zeros_like(self.delta)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClientTable:
    """One row per client of the round, in task order.

    ``updates`` has a row per group of clients, as in
    :class:`~raysys.federated.core.messages.Partial`; in a round's report ``update_row`` is the
    model id.
    """

    clients: IntArray
    rows: IntArray
    loss_first: npt.NDArray[np.float32]
    loss_last: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    n_samples: IntArray
    status: npt.NDArray[np.int8]
    sketch: npt.NDArray[np.float32] | None = None
    sketch_half: npt.NDArray[np.float32] | None = None
    controls: npt.NDArray[np.float32] | None = None
    updates: npt.NDArray[np.float32] | None = None
    update_weight: npt.NDArray[np.float32] | None = None
    update_row: npt.NDArray[Any] | None = None

    def count(self, status: Status) -> int:
        """Number of clients with a status."""
        return int((self.status == status).sum())

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Which rows were folded."""
        folded: npt.NDArray[np.bool_] = self.status == Status.OK
        return folded


class RoundFold:
    """Collects the partials of one (round, attempt) and sums them per model.

    Args:
        expected: number of clients of each task, by task number.
        spec_id: spec the partials must be of. models: rows of the round's stacked weights.
    """

    def __init__(
        self, round_id: int, attempt: int, expected: list[int], spec_id: str, models: int = 1
    ) -> None:
        self.round_id = round_id
        self.attempt = attempt
        self.duplicates = 0
        self.busy_s = 0.0
        self._expected = expected
        self._spec_id = spec_id
        self._models = models
        self._waiting: dict[int, Partial] = {}
        self._seen: set[int] = set()
        self._next = 0
        self._delta: FloatArray | None = None
        self._weight: FloatArray | None = None
        self._scalar: FloatArray | None = None
        self._tables: list[Partial] = []

    @property
    def missing(self) -> list[int]:
        """Task numbers without an answer."""
        return [task for task in range(len(self._expected)) if task not in self._seen]

    def add(self, partial: Partial) -> bool:
        """Fold one partial; False if it is a duplicate or belongs to a closed round.

        Raises:
            ConfigError: rows are missing, or the partial is of another model.
        """
        if (partial.round_id, partial.attempt) != (self.round_id, self.attempt):
            return False
        if partial.task_id in self._seen:
            self.duplicates += 1
            return False
        self._check(partial)
        self._seen.add(partial.task_id)
        self._waiting[partial.task_id] = partial
        while self._next in self._waiting:
            self._sum(self._waiting.pop(self._next))
            self._next += 1
        return True

    def sums(self) -> list[ModelSum]:
        """Sums per model row.

        Raises:
            ConfigError: tasks are still missing.
        """
        if self.missing:
            raise ConfigError("round", self.missing, "an answer to every task before closing")
        if self._delta is None or self._weight is None or self._scalar is None:
            return []
        counts = self._clients_per_row(len(self._delta))
        return [
            ModelSum(delta, float(weight), float(scalar), int(count))
            for delta, weight, scalar, count in zip(self._delta, self._weight, self._scalar, counts)
        ]

    def table(self) -> ClientTable:
        """The per-client columns of all tasks."""
        parts = self._tables

        def join(name: str) -> npt.NDArray[np.float32]:
            return np.concatenate([getattr(part, name) for part in parts])

        def optional(name: str) -> npt.NDArray[np.float32] | None:
            there = bool(parts) and getattr(parts[0], name) is not None
            return join(name) if there else None

        return ClientTable(
            clients=join("clients").astype(np.int64),
            rows=join("rows").astype(np.int64),
            loss_first=join("loss_first"),
            loss_last=join("loss_last"),
            norm=join("norm"),
            n_samples=join("n_samples").astype(np.int64),
            status=join("status").astype(np.int8),
            sketch=optional("sketch"),
            sketch_half=optional("sketch_half"),
            controls=optional("controls"),
            updates=optional("updates"),
            update_weight=optional("update_weight"),
            update_row=optional("update_row"),
        )

    def _check(self, partial: Partial) -> None:
        if not 0 <= partial.task_id < len(self._expected):
            raise ConfigError("partial.task_id", partial.task_id, f"0..{len(self._expected) - 1}")
        if partial.spec_id != self._spec_id:
            raise ConfigError("partial.spec_id", partial.spec_id, self._spec_id, "Another model's")
        wanted = self._expected[partial.task_id]
        columns = (partial.clients, partial.status, partial.norm, partial.loss_last)
        if any(len(column) != wanted for column in columns):
            raise ConfigError(
                "partial.clients", len(partial.clients), f"{wanted} rows, one per client asked"
            )
        sums = (partial.sum_delta, partial.sum_weight, partial.sum_scalar)
        if not all(np.isfinite(part).all() for part in sums):
            raise ConfigError("partial.sum_delta", "NaN or infinity", "screened, finite sums")
        width = partial.sum_delta.shape[-1] if self._delta is None else self._delta.shape[1]
        if partial.sum_delta.shape != (len(partial.present), width):
            shape = (len(partial.present), width)
            raise ConfigError("partial.sum_delta", partial.sum_delta.shape, f"shape {shape}")
        if partial.updates is not None and not np.isfinite(partial.updates).all():
            raise ConfigError("partial.updates", "NaN or infinity", "screened, finite updates")
        if len(partial.present) and not 0 <= partial.present.min() <= partial.present.max() < (
            self._models
        ):
            raise ConfigError("partial.present", partial.present, f"rows below {self._models}")

    def _sum(self, partial: Partial) -> None:
        if self._delta is None or self._weight is None or self._scalar is None:
            self._delta = np.zeros((self._models, partial.sum_delta.shape[1]))
            self._weight, self._scalar = np.zeros(self._models), np.zeros(self._models)
        for row, part in zip(partial.present.tolist(), partial.sum_delta):
            self._delta[row] += part  # in place: indexing by the array would copy all rows
        self._weight[partial.present] += partial.sum_weight
        self._scalar[partial.present] += partial.sum_scalar
        self.busy_s += partial.busy_s
        # The sums are folded; keep only the columns.
        empty = np.zeros((0, 0))
        self._tables.append(dataclasses.replace(partial, sum_delta=empty))

    def _clients_per_row(self, models: int) -> IntArray:
        counts = np.zeros(models, dtype=np.int64)
        for part in self._tables:
            counts += np.bincount(part.rows[part.status == Status.OK], minlength=models)
        return counts
