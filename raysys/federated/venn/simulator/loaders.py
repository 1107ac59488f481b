"""Device traces: Parquet, CSV, the pickles of FedScale, and generated ones.

A pickle can run code when it is read, so only plain containers and numbers are let through.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from raysys.errors import ConfigError, DataError, StorageError
from raysys.federated.venn.simulator.trace import DEFAULT_PERIOD_S, Floats, Trace

GRACE_S = 80.0
MEAN_COMPUTE_MS = 78.0
MEAN_BANDWIDTH_KBPS = 13_736.0
# Shares of the 959 phone models by groups {general, compute-rich, memory-rich, both}.
REAL_MASKS: tuple[tuple[int, int], ...] = ((0, 35), (1, 305), (3, 78), (5, 124), (15, 417))
# Name (without ending) and columns of every table of a trace folder.
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "availability": (
        "fedscale_availability_recon",
        ("device_id", "start_s", "duration_s"),
    ),
    "capacity": ("fedscale_device_capacity_recon", ("compute_ms", "bandwidth_kbps")),
    "eligibility": ("venn_eligibility", ("mask",)),
}
_PICKLE_BYTES = 512 * 2**20


def build_trace(
    intervals: tuple[npt.ArrayLike, npt.ArrayLike],
    capacity: tuple[npt.ArrayLike, npt.ArrayLike],
    masks: npt.ArrayLike,
    period_s: float = DEFAULT_PERIOD_S,
) -> Trace:
    """Join intervals, capacities and masks as the public program does.

    Record i, sorted by start, takes capacity record ``i mod len(capacity)`` and mask ``i mod
    len(masks)``; 80 s are added to the end of every interval.

    Args:
        intervals: start and duration in seconds; any order.
        capacity: compute time per sample in ms, and bandwidth in kbit/s.
        masks: eligibility masks, unsigned.

    Raises:
        DataError: empty columns, non-finite or non-positive values, starts outside the period.
    """
    start, duration = (_finite("intervals", column) for column in intervals)
    compute, bandwidth = (_finite("capacity", column) for column in capacity)
    mask = np.asarray(masks, dtype=np.int64).reshape(-1)
    if not len(mask):
        raise DataError("masks", "no records", "Give at least one eligibility mask")
    if np.any(duration < 0):  # rounded to nothing is still a check-in with its grace
        raise DataError("intervals", "an interval ends before it starts", "Drop such intervals")
    if np.any(compute <= 0) or np.any(bandwidth <= 0):
        raise DataError("capacity", "a value is not positive", "Drop devices without a record")
    order = np.argsort(start, kind="stable")
    count = len(order)
    distinct, inverse = np.unique(mask, return_inverse=True)
    return Trace(
        start=start[order],
        online=duration[order] + GRACE_S,
        compute=np.resize(compute, count) / MEAN_COMPUTE_MS,
        comm=MEAN_BANDWIDTH_KBPS / np.resize(bandwidth, count),
        atom=np.resize(inverse.astype(np.int64), count),
        masks=tuple(int(value) for value in distinct),
        period_s=period_s,
    )


def load_trace(folder: Path, devices: int | None = None) -> Trace:
    """Trace from a folder with availability, capacity and eligibility of devices.

    Each of the three may be a Parquet or a CSV file (see :data:`FILES`); for the first two the
    original FedScale pickles are taken where they are there.

    Args:
        devices: only the first so many devices; more than there are gives copies, shifted in time.

    Raises:
        StorageError: a file is missing; DataError: a file lacks a column or holds bad values.
    """
    device, start, duration = _availability(folder)
    _check_overlaps(device, start, duration)
    if devices is not None:
        device, start, duration = _population(device, start, duration, devices)
    masks = _table(folder, "eligibility")[0]
    return build_trace((start, duration), _capacities(folder), masks)


def _availability(folder: Path) -> tuple[Floats, Floats, Floats]:
    """Device, start and duration of every interval."""
    original = folder / "client_behave_trace"
    if not original.is_file():
        device, start, duration = _table(folder, "availability")
        return device, start, duration
    records = load_pickle(original)
    start, duration = fedscale_intervals(records, str(original))
    counts = [len(record["active"]) for record in records.values()]
    return np.repeat(np.arange(len(counts), dtype=np.float64), counts), start, duration


def _capacities(folder: Path) -> tuple[Floats, Floats]:
    original = folder / "client_device_capacity"
    if original.is_file():
        return fedscale_capacity(load_pickle(original), str(original))
    compute, bandwidth = _table(folder, "capacity")
    return compute, bandwidth


def _table(folder: Path, kind: str) -> list[Floats]:
    """Columns of one of the tables, Parquet before CSV."""
    stem, names = FILES[kind]
    found = [folder / f"{stem}{end}" for end in (".parquet", ".csv")]
    return read_columns(next((path for path in found if path.is_file()), found[0]), names)


def generated_trace(intervals: int = 20_000, seed: int = 0) -> Trace:
    """A trace with the real shares of the atoms and a daily rhythm, for use without data files."""
    generator = np.random.default_rng(seed)
    phase = generator.random(4 * intervals) * DEFAULT_PERIOD_S
    keep = generator.random(len(phase)) < 0.5 * (1 + 0.2 * np.sin(phase * 2 * np.pi / 86_400))
    start = np.floor(phase[keep][:intervals])
    short = np.exp(generator.normal(np.log(900), 1.6, len(start)))
    long = np.exp(generator.normal(np.log(16_200), 0.7, len(start)))
    duration = np.clip(np.where(generator.random(len(start)) < 0.7, short, long), 5, 50_400)
    fast = generator.random(len(start)) < 0.5
    compute = np.where(
        fast, generator.normal(24, 5, len(start)), generator.normal(150, 25, len(start))
    )
    bandwidth = np.exp(generator.normal(np.log(6_100), 1.1, len(start)))
    masks = np.repeat([mask for mask, _ in REAL_MASKS], [count for _, count in REAL_MASKS])
    return build_trace(
        (start, duration),
        (np.clip(compute, 5, 250), np.clip(bandwidth, 300, 200_000)),
        generator.permutation(masks),
    )


def read_columns(path: Path, names: tuple[str, ...]) -> list[Floats]:
    """Columns of a Parquet or CSV file as float64.

    Raises:
        StorageError: the file cannot be read; DataError: a column is missing or not numeric.
    """
    if not path.is_file():
        raise StorageError(str(path), "no such file", "Check the data folder")
    try:
        table = (
            pyarrow.csv.read_csv(path)
            if path.suffix == ".csv"
            else pyarrow.parquet.read_table(path)
        )
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise DataError(str(path), f"no column {missing[0]!r}", "Needed: " + ", ".join(names))
        return [
            np.asarray(table.column(name).to_numpy(), dtype=np.float64).reshape(-1)
            for name in names
        ]
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(str(path), str(error).split("\n")[0], "Give a valid table") from error


def load_pickle(path: Path) -> Any:
    """Read a pickle of plain containers and numbers; anything else is refused unread.

    Raises:
        StorageError: the file cannot be read; DataError: it is damaged, too large, or names a
            class or function.
    """
    try:
        if path.stat().st_size > _PICKLE_BYTES:
            raise DataError(str(path), "larger than 512 MiB", "Convert it to Parquet")
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error), "Check the path") from error
    try:
        return _PlainUnpickler(io.BytesIO(data), str(path)).load()
    except DataError:
        raise
    except Exception as error:
        reason = f"damaged pickle ({type(error).__name__})"
        raise DataError(str(path), reason, "Fetch the file again") from error


def fedscale_intervals(records: Any, source: str = "pickle") -> tuple[Floats, Floats]:
    """Start and duration from FedScale's ``{device: {"active": [...], "inactive": [...]}}``.

    Raises:
        DataError: other content, lists of unequal length, or an interval that ends too early.
    """
    starts: list[float] = []
    ends: list[float] = []
    try:
        for record in records.values():
            active, inactive = list(record["active"]), list(record["inactive"])
            if len(active) != len(inactive):
                raise DataError(source, "active and inactive differ in length", "Check the record")
            starts += map(float, active)
            ends += map(float, inactive)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"not a behaviour trace ({type(error).__name__})"
        raise DataError(source, reason, "Expected {device: {active, inactive}}") from error
    start, end = np.asarray(starts), np.asarray(ends)
    if not len(start) or np.any(end <= start):
        raise DataError(source, "no intervals, or one that ends before it starts", "Clean the file")
    return start, end - start


def fedscale_capacity(records: Any, source: str = "pickle") -> tuple[Floats, Floats]:
    """Compute (ms) and bandwidth (kbit/s) from ``{device: {"computation", "communication"}}``.

    Raises:
        DataError: other content.
    """
    try:
        compute = [float(record["computation"]) for record in records.values()]
        bandwidth = [float(record["communication"]) for record in records.values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"not a capacity file ({type(error).__name__})"
        raise DataError(source, reason, "Expected computation, communication") from error
    return np.asarray(compute), np.asarray(bandwidth)


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, source: str) -> None:
        super().__init__(stream)
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        reason = f"it names {module}.{name}, and only plain containers and numbers are allowed"
        raise DataError(self._source, reason, "Convert the file to Parquet")

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(self._source, "it refers to outside objects", "Convert it to Parquet")


def _finite(name: str, column: npt.ArrayLike) -> Floats:
    array = np.asarray(column, dtype=np.float64).reshape(-1)
    if not len(array) or not np.isfinite(array).all():
        raise DataError(name, "empty, or a value is not finite", "Clean the file")
    return array


def _check_overlaps(device: Floats, start: Floats, duration: Floats) -> None:
    order = np.lexsort((start, device))
    same = device[order][1:] == device[order][:-1]
    end = (start + duration)[order][:-1]
    bad = np.flatnonzero(same & (start[order][1:] < end))
    if len(bad):
        who = int(device[order][bad[0]])
        raise DataError("intervals", f"intervals of device {who} overlap", "Merge them first")


def _population(
    device: Floats, start: Floats, duration: Floats, devices: int
) -> tuple[Floats, Floats, Floats]:
    """The first ``devices`` devices; beyond the file's own, copies shifted by up to 30 minutes."""
    if devices < 1:
        raise ConfigError("devices", devices, "at least 1")
    base = int(device.max()) + 1
    parts: list[tuple[Floats, Floats, Floats]] = []
    for copy in range(-(-devices // base)):
        keep = device + copy * base < devices
        shift = np.random.default_rng(copy).uniform(-1800, 1800, base) if copy else np.zeros(base)
        moved = (start[keep] + shift[device[keep].astype(np.int64)]) % DEFAULT_PERIOD_S
        parts.append((device[keep] + copy * base, moved, duration[keep]))
    columns: list[Floats] = [np.concatenate(column) for column in zip(*parts)]
    return columns[0], columns[1], columns[2]
