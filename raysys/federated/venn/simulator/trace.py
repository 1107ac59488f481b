"""One period of check-ins as columns sorted by time; repetition is virtual.

Position ``p`` means period ``p // n`` and row ``p % n``, so months of simulated time cost no
memory. A *stream* is an (atom, capability class) pair; the merged rows of a set of streams are
built once and kept, which turns "when has this set brought D more devices?" into one index.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError, DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DEFAULT_PERIOD_S = 432_000.0
ROWS_CACHE_BYTES = 256 * 2**20
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


@dataclass(eq=False, slots=True)
class Trace:
    """Columns of equal length N, sorted by ``start``.

    Args:
        start: check-in times within the period, seconds, float64.
        online: seconds that the device stays online after its check-in, float64.
        compute: time per sample relative to the population's mean (larger is slower), float64.
        comm: transfer time relative to the population's mean, float64.
        atom: index into ``masks``, int64.
        masks: eligibility mask of every atom.
        period_s: length of the period.
        classes: number of capability classes.
        capability: class of every row in [0, classes), 0 the fastest; int64.
    """

    start: Floats
    online: Floats
    compute: Floats
    comm: Floats
    atom: Ints
    masks: tuple[int, ...]
    period_s: float = DEFAULT_PERIOD_S
    classes: int = 1
    capability: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    _rows: OrderedDict[int, Ints] = field(default_factory=OrderedDict, repr=False)
    _rows_bytes: int = 0
    _stream: Ints = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    def __post_init__(self) -> None:
        if not len(self.start):
            raise DataError("trace", "no check-ins", "Give at least one online interval")
        if np.any(np.diff(self.start) < 0):
            raise DataError("trace", "check-ins are not sorted by time", "Sort them by start")
        if self.start[0] < 0 or self.start[-1] >= self.period_s:
            raise ConfigError("period_s", self.period_s, "more than every start time")
        if not len(self.capability):
            self.capability = np.zeros(len(self.start), np.int64)
        self._stream = self.atom * self.classes + self.capability

    def __len__(self) -> int:
        return len(self.start)

    @property
    def groups(self) -> int:
        """Number of groups that the masks speak of."""
        return max((mask.bit_length() for mask in self.masks), default=0)

    def with_speed_classes(self, classes: int, work_s: float = 30, comm_s: float = 10) -> Trace:
        """Split the rows into classes of equal size by expected task time, fastest first."""
        task_s = work_s * self.compute + 2 * comm_s * self.comm
        edges = np.quantile(task_s, np.arange(1, classes) / classes)
        capability = np.searchsorted(edges, task_s, side="right").astype(np.int64)
        return self._with(classes, capability)

    def with_random_classes(self, classes: int, seed: int) -> Trace:
        """Put every row into a class at random (static partition)."""
        generator = np.random.default_rng(seed)
        return self._with(classes, generator.integers(0, classes, len(self)))

    def _with(self, classes: int, capability: Ints) -> Trace:
        return replace(
            self, classes=classes, capability=capability, _rows=OrderedDict(), _rows_bytes=0
        )

    def rows_of(self, streams: int) -> Ints:
        """Rows (sorted) of a bitset of streams; cached, least recently used dropped first."""
        rows = self._rows.get(streams)
        if rows is not None:
            self._rows.move_to_end(streams)
            return rows
        member = np.zeros(len(self.masks) * self.classes, dtype=bool)
        for stream in range(len(member)):
            member[stream] = streams >> stream & 1
        rows = np.flatnonzero(member[self._stream])
        self._rows[streams] = rows
        self._rows_bytes += rows.nbytes
        while self._rows_bytes > ROWS_CACHE_BYTES and len(self._rows) > 1:
            self._rows_bytes -= self._rows.popitem(last=False)[1].nbytes
        return rows

    def position_at(self, time_s: float) -> int:
        """Number of check-ins (virtual position) strictly before ``time_s``."""
        period, rest = divmod(time_s, self.period_s)
        return int(period) * len(self.start) + int(self.start.searchsorted(rest))

    def count_before(self, rows: Ints, position: int) -> int:
        """How many entries of the repeated ``rows`` lie before a virtual position."""
        period, row = divmod(position, len(self.start))
        return period * len(rows) + int(rows.searchsorted(row))

    def time_of(self, position: int) -> float:
        """Check-in time of a virtual position."""
        period, row = divmod(position, len(self.start))
        return period * self.period_s + float(self.start[row])

    def rates_at(self, time_s: float, window_s: float) -> list[float]:
        """Check-ins per second of every atom over the window before ``time_s``.

        The trace is periodic, so a window that reaches before time 0 sees the end of the period:
        the estimator starts warm.
        """
        last, first = self.position_at(time_s), self.position_at(time_s - window_s)
        every = (1 << self.classes) - 1
        rates = []
        for atom in range(len(self.masks)):
            rows = self.rows_of(every << atom * self.classes)
            seen = self.count_before(rows, last) - self.count_before(rows, first)
            rates.append(seen / window_s)
        return rates


def hash_uniform(positions: npt.NDArray[np.integer], seed: int) -> Floats:
    """A uniform number in [0, 1) per position; the same position always gets the same number.

    SplitMix64 over the position, so that a device's delay does not depend on how often or in which
    order a simulator asks for it.
    """
    offset = np.uint64((seed * _GOLDEN + _GOLDEN) & _WORD)
    mixed = positions.astype(np.uint64) * np.uint64(_GOLDEN) + offset
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
