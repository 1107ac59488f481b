"""Who the clients are: a CSR index over shared samples, and optional columns about devices.

A client is a slice of an array, never an object: a million clients cost 8 MB of offsets plus four
bytes a sample. See the federated core, "Data model".
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

IntArray = npt.NDArray[np.int64]
SampleIds = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """When devices are reachable, as CSR intervals [start_s, end_s), sorted within a device."""

    offsets: IntArray
    start_s: FloatArray
    end_s: FloatArray

    def __post_init__(self) -> None:
        _check_offsets("availability.offsets", self.offsets, len(self.start_s))
        if len(self.start_s) != len(self.end_s):
            raise ConfigError(
                "availability.end_s", len(self.end_s), f"{len(self.start_s)} interval ends"
            )
        finite = np.isfinite(self.start_s) & np.isfinite(self.end_s)
        wrong = np.flatnonzero(~finite | (self.end_s <= self.start_s))
        if wrong.size:
            row = int(wrong[0])
            raise ConfigError(
                f"availability[{row}]",
                (float(self.start_s[row]), float(self.end_s[row])),
                "an interval that ends after it starts",
                "Drop or correct the row",
            )
        same_device = np.ones(len(self.start_s), dtype=bool)
        same_device[self.offsets[:-1][self.offsets[:-1] < len(self.start_s)]] = False
        overlap = np.flatnonzero(same_device[1:] & (self.start_s[1:] < self.end_s[:-1])) + 1
        if overlap.size:
            raise ConfigError(
                f"availability[{int(overlap[0])}]",
                float(self.start_s[overlap[0]]),
                "intervals of a device sorted and apart from one another",
                "Merge overlapping intervals",
            )

    def available(self, time_s: float) -> npt.NDArray[np.bool_]:
        """Which devices are reachable at a moment, bool [n_clients]."""
        covers = (self.start_s <= time_s) & (time_s < self.end_s)
        total = np.concatenate(([0], np.cumsum(covers)))
        reachable: npt.NDArray[np.bool_] = total[self.offsets[1:]] > total[self.offsets[:-1]]
        return reachable


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """Clients and their samples.

    Args:
        offsets: int64 [n_clients + 1]; client c owns ``sample_ids[offsets[c]:offsets[c + 1]]``.
        sample_ids: int32 rows of the shared sample arrays.
        rate_mac_s: device speed in multiply-accumulates per second, [n_clients], or None.
        memory_bytes: device memory, [n_clients], or None.
        bandwidth_bytes_s: link speed, [n_clients], or None.
        availability: reachable intervals, or None for "always".

    Raises:
        ConfigError: no clients, offsets that do not describe the samples, or a capacity that is
            not a finite positive number.
    """

    offsets: IntArray
    sample_ids: SampleIds
    rate_mac_s: FloatArray | None = None
    memory_bytes: FloatArray | None = None
    bandwidth_bytes_s: FloatArray | None = None
    availability: Availability | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.ascontiguousarray(self.offsets, dtype=np.int64))
        object.__setattr__(self, "sample_ids", np.ascontiguousarray(self.sample_ids, np.int32))
        if len(self.offsets) < 2:
            raise ConfigError("population.offsets", len(self.offsets), "at least one client")
        _check_offsets("population.offsets", self.offsets, len(self.sample_ids))
        if self.sample_ids.size and self.sample_ids.min() < 0:
            raise ConfigError("population.sample_ids", int(self.sample_ids.min()), "rows >= 0")
        for name in ("rate_mac_s", "memory_bytes", "bandwidth_bytes_s"):
            self._check_column(name)
        if self.availability is not None and len(self.availability.offsets) != len(self.offsets):
            raise ConfigError(
                "population.availability",
                len(self.availability.offsets) - 1,
                f"intervals of {self.n_clients} clients",
            )

    @property
    def n_clients(self) -> int:
        """Number of registered clients."""
        return len(self.offsets) - 1

    def counts(self, clients: IntArray | None = None) -> IntArray:
        """Samples of each client, int64; of all clients when ``clients`` is None."""
        if clients is None:
            return np.diff(self.offsets)
        return self.offsets[clients + 1] - self.offsets[clients]

    def samples(self, client: int) -> SampleIds:
        """Rows of one client, int32 view."""
        return self.sample_ids[self.offsets[client] : self.offsets[client + 1]]

    def check_clients(self, clients: npt.ArrayLike) -> IntArray:
        """Return ids as int64 [k] after checking that they are known and different.

        Raises:
            ConfigError: an id outside the population, or twice the same.
        """
        ids = np.asarray(clients)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ConfigError("clients", f"{ids.dtype} {ids.shape}", "a list of whole numbers")
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.n_clients)]
        if outside.size:
            raise ConfigError("clients", int(outside[0]), f"ids from 0 to {self.n_clients - 1}")
        ordered = np.sort(ids)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.size:
            raise ConfigError("clients", int(twice[0]), "each client at most once in a round")
        return ids

    def _check_column(self, name: str) -> None:
        column = getattr(self, name)
        if column is None:
            return
        column = np.ascontiguousarray(column, dtype=np.float64)
        object.__setattr__(self, name, column)
        if column.shape != (self.n_clients,):
            raise ConfigError(f"population.{name}", column.shape, f"shape ({self.n_clients},)")
        wrong = np.flatnonzero(~np.isfinite(column) | (column <= 0))
        if wrong.size:
            row = int(wrong[0])
            raise ConfigError(f"population.{name}[{row}]", float(column[row]), "a number above 0")


def population_from_lists(groups: list[npt.NDArray[np.int64]]) -> Population:
    """Population whose client c owns the rows ``groups[c]``; groups may be empty or overlap."""
    if not groups:
        raise ConfigError("population", 0, "at least one client")
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    ids = np.concatenate(groups) if sizes.sum() else np.empty(0)
    return Population(
        offsets=np.concatenate(([0], np.cumsum(sizes))), sample_ids=ids.astype(np.int32)
    )


def _check_offsets(field: str, offsets: IntArray, total: int) -> None:
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise ConfigError(
            field,
            f"{int(offsets[0])}..{int(offsets[-1])}",
            f"rising offsets from 0 to {total}",
            "Build them as concatenate([0], cumsum(sizes))",
        )
