"""Checkpoints of a store: a manifest and part files, independent of shards, layout and slots.

A checkpoint is a folder: ``manifest.json`` (format version, tables, constants of the hash, clock,
list of parts with sizes and SHA-256) and ``part-NNNN.arrow``, one per range of virtual rows. It is
written under a temporary name and renamed, so an interrupted save leaves the previous one valid;
a load checks everything before it changes anything.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raysys.errors import CapabilityError, DataError, StorageError
from raysys.ops import fiited_abi as abi
from raysys.training.fiited.native import NativeEngine
from raysys.training.fiited.store import FiitedStore

VERSION = 2  # 2: the queue of candidates, numbers of the caller
PART_BYTES = 64 * 2**20
_LAST = 2**64 - 1
Arrays = dict[str, npt.NDArray[Any]]


def save(
    store: FiitedStore, folder: str | Path, *, extra: dict[str, int] | None = None
) -> dict[str, Any]:
    """Write a checkpoint; an existing one at this path is replaced at the very end.

    Needs the memory of one part. ``extra`` are numbers that the caller wants back at load.

    Returns:
        The manifest.

    Raises:
        StorageError: the folder cannot be written.
        CapabilityError: the reference engine has no checkpoints.
    """
    engine = _native(store)
    pieces = (_part_arrays(engine, *piece) for piece in _pieces(engine))
    return _write(Path(folder), _manifest(store, engine, extra or {}), pieces, _clock(engine))


class Snapshot:
    """A copy of a store's state, taken at once, to be written while training goes on.

    Taking it is one pass of memory copies (training waits that long); it needs as much memory as
    the state itself, which pruning has made small.
    """

    def __init__(self, store: FiitedStore, extra: dict[str, int] | None = None) -> None:
        engine = _native(store)
        self._manifest = _manifest(store, engine, extra or {})
        self._pieces = [_part_arrays(engine, *piece) for piece in _pieces(engine)]
        self._clock = _clock(engine)

    def write(self, folder: str | Path) -> dict[str, Any]:
        """As :func:`save`; may run in another thread."""
        return _write(Path(folder), self._manifest, iter(self._pieces), self._clock)


def load(store: FiitedStore, folder: str | Path, *, owned: range | None = None) -> int:
    """Fill an empty store; returns the number of rows that came in.

    The store may have another layout, free policy, engine build or budget (with a smaller one the
    least useful chunks are left out). ``owned`` restricts the rows to buckets (the top 12 bits of
    the virtual row), which is how a checkpoint is spread over another number of shards.

    Raises:
        DataError: the checkpoint is damaged or belongs to another set of tables; the message
            names the file and the store has not changed.
        StorageError: it cannot be read.
    """
    buckets = np.zeros(abi.BUCKETS, np.uint8)
    buckets[list(owned) if owned is not None else slice(None)] = 1
    load_shards(store, [Path(folder)], buckets)
    return int(store.engine.counters()["rows"])


def load_shards(
    store: FiitedStore, folders: list[Path], owned: npt.NDArray[np.uint8]
) -> dict[str, int]:
    """Fill an empty store with the owned buckets (u8[4096]) of a group of shards' checkpoints.

    Returns:
        The ``extra`` numbers of the first one.

    Raises:
        DataError, StorageError: as :func:`load`; also when the shards' steps differ.
    """
    engine = _native(store)
    if not folders:
        raise DataError("checkpoint", "no shard's folder", "Give a checkpoint")
    manifests = [_read_manifest(root) for root in folders]
    steps = {manifest.get("steps") for manifest in manifests}
    if len(steps) > 1:
        raise DataError(str(folders[0].parent), f"steps {sorted(map(str, steps))}", "Take one save")
    clocks, parts = [], []
    for root, manifest in zip(folders, manifests):
        _check_fits(store, root, manifest)
        clock, pieces = _read_parts(store, root, manifest)
        clocks.append(clock)
        parts += [_owned(store, piece, owned) for piece in pieces]
    if engine.counters()["rows"]:
        raise DataError(str(folders[0]), "the store is not empty", "Load into a new store")
    for entries, utils, values in parts if _fits(store, parts) else [_most_useful(store, parts)]:
        engine.import_(entries, utils, values, owned)
    _set_clock(store, engine, clocks, owned)
    return {name: int(value) for name, value in manifests[0].get("extra", {}).items()}


def _write(
    target: Path, manifest: dict[str, Any], pieces: Iterator[tuple[str, Arrays, int]], clock: Arrays
) -> dict[str, Any]:
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with ThreadPoolExecutor(1) as disk:  # waits for a part while the next one is made
            parts, synced = [], []
            for name, arrays, rows in itertools.chain(pieces, [("clock.arrow", clock, 0)]):
                parts.append(_write_arrays(partial / name, arrays) | {"rows": rows})
                synced.append(disk.submit(_sync, partial / name))
            for done in synced:
                done.result()
        manifest = manifest | {"parts": parts}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _swap(partial, target)
    except OSError as error:
        raise StorageError(
            str(target), error.strerror or str(error), "Check space and rights"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _pieces(engine: NativeEngine) -> list[tuple[int, int, int]]:
    """Ranges of virtual rows of about PART_BYTES each: (index, low, high)."""
    counters = engine.counters()
    size = counters["pool_live"] + counters["rows"] * 64
    count = max(1, min(abi.BUCKETS, round(size / PART_BYTES)))
    step = abi.BUCKETS // count
    edges = [bucket << 52 for bucket in range(0, abi.BUCKETS, step)] + [_LAST + 1]
    return [(i, low, high - 1) for i, (low, high) in enumerate(itertools.pairwise(edges))]


def _part_arrays(engine: NativeEngine, index: int, low: int, high: int) -> tuple[str, Arrays, int]:
    entries, utils, values = engine.export(low, high)
    arrays: Arrays = {
        "entries": entries.view(np.uint8),
        "utils": utils.reshape(-1),
        "values": values,
    }
    return f"part-{index:04d}.arrow", arrays, len(entries)


def _clock(engine: NativeEngine) -> Arrays:
    integers, reals, window = engine.clock()
    return {
        "integers": integers,
        "reals": reals,
        "window": window,
        "sketch": engine.sketch(),
        "queue": engine.queue().view(np.uint8),
        **{name: array.reshape(-1) for name, array in engine.history().items()},
    }


class _HashedFile(io.RawIOBase):
    """A file that knows the digest and the size of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest, self.size = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self._file.write(data)
        self.size += written
        return written


def _write_arrays(path: Path, arrays: Arrays) -> dict[str, Any]:
    """One Arrow file with one column and one batch per array (their lengths differ)."""
    with path.open("wb") as file:
        sink = _HashedFile(file)
        for name, array in arrays.items():
            table = pa.table({name: pa.array(np.ascontiguousarray(array))})
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return {"name": path.name, "bytes": sink.size, "sha256": sink.digest.hexdigest()}


def _sync(path: Path) -> None:
    """Wait until a closed file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(store: FiitedStore, engine: NativeEngine, extra: dict[str, int]) -> dict[str, Any]:
    return {
        "format": "raysys-fiited",
        "version": VERSION,
        "mixer": abi.MIXER,
        "chunk": store.config.chunk,
        "states": store.config.states,
        "seed": store.config.seed,
        "steps": store.steps,
        "tables": [
            {"name": t.name, "dim": t.dim, "virtual_rows": t.virtual_rows, "seed": s}
            for t, s in zip(store.tables, engine.table_seeds())
        ],
        "extra": dict(extra),
    }


def _swap(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error), "Give a checkpoint") from error
    except ValueError:
        raise DataError(str(path), "not JSON", "Use an intact checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "raysys-fiited":
        raise DataError(str(path), "not a FIITED checkpoint", "Use an intact checkpoint")
    if manifest.get("version") != VERSION:
        got = manifest.get("version")
        raise DataError(str(path), f"format version {got}, expected {VERSION}", "Convert it")
    return manifest


def _check_fits(store: FiitedStore, root: Path, manifest: dict[str, Any]) -> None:
    ours = _manifest(store, _native(store), {})
    for name in ("mixer", "chunk", "states", "tables"):
        if manifest.get(name) != ours[name]:
            reason = f"{name} is {manifest.get(name)}, this store has {ours[name]}"
            raise DataError(
                str(root / "manifest.json"), reason, "Use the same tables and optimizer"
            )
    listed = {part["name"] for part in manifest["parts"]}
    present = {path.name for path in root.iterdir()} - {"manifest.json"}
    if listed != present:
        odd = min(listed ^ present)
        raise DataError(str(root / odd), "missing, or not named by the manifest", "Restore it")


Part = tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def _read_parts(
    store: FiitedStore, root: Path, manifest: dict[str, Any]
) -> tuple[dict[str, npt.NDArray[Any]], list[Part]]:
    clock: dict[str, npt.NDArray[Any]] = {}
    parts: list[Part] = []
    for part in manifest["parts"]:
        path = root / part["name"]
        if path.parent != root or path.is_symlink() or not path.is_file():
            raise DataError(str(path), "not a plain file of the checkpoint", "Restore it")
        arrays = read_arrays(path, part)
        if part["name"] == "clock.arrow":
            clock = arrays
            continue
        entries = arrays["entries"].view(abi.ENTRY)
        utils = arrays["utils"].reshape(len(entries), -1)
        _check_part(store, path, part, entries, utils, arrays["values"])
        parts.append((entries, utils, arrays["values"]))
    if not clock:
        raise DataError(str(root / "clock.arrow"), "missing", "Restore it")
    return clock, parts


def read_arrays(path: Path, part: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    data = path.read_bytes()
    if len(data) != part["bytes"] or hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise DataError(str(path), "size or checksum differs", "Restore an intact copy")
    arrays: dict[str, npt.NDArray[Any]] = {}
    reader = pa.BufferReader(data)
    while reader.tell() < len(data):
        table = pa.ipc.open_stream(reader).read_all()
        column = table.column(0).combine_chunks()
        arrays[table.column_names[0]] = column.to_numpy(zero_copy_only=False)
    return arrays


def _check_part(
    store: FiitedStore,
    path: Path,
    part: dict[str, Any],
    entries: npt.NDArray[Any],
    utils: npt.NDArray[np.float32],
    values: npt.NDArray[np.float32],
) -> None:
    chunks = int(np.bitwise_count(entries["alive"] & abi.ALIVE_MASK).sum())
    expected = chunks * store.config.chunk * (1 + store.config.states)
    if part["rows"] != len(entries) or len(values) != expected:
        raise DataError(str(path), "lengths do not fit together", "Restore an intact copy")
    if len(entries) and int(entries["table"].max()) >= len(store.tables):
        raise DataError(str(path), "a row of an unknown table", "Restore an intact copy")
    if not (np.isfinite(values).all() and np.isfinite(utils).all()):
        raise DataError(str(path), "NaN or infinity inside", "Use an earlier checkpoint")


def _owned(store: FiitedStore, part: Part, owned: npt.NDArray[np.uint8]) -> Part:
    """The rows of the owned buckets."""
    entries, utils, values = part
    mine = owned[(entries["key"] >> np.uint64(52)).astype(np.int64)] > 0
    if mine.all():
        return part
    width = store.config.chunk * (1 + store.config.states)
    lengths = np.bitwise_count(entries["alive"] & abi.ALIVE_MASK).astype(np.int64) * width
    return entries[mine], np.ascontiguousarray(utils[mine]), values[np.repeat(mine, lengths)]


def _fits(store: FiitedStore, parts: list[Part]) -> bool:
    chunks = sum(int(np.bitwise_count(e["alive"] & abi.ALIVE_MASK).sum()) for e, _, _ in parts)
    return chunks <= store.slots


def _most_useful(store: FiitedStore, parts: list[Part]) -> Part:
    """All rows, most useful first, so that a smaller budget leaves the least useful out."""
    entries = np.concatenate([e for e, _, _ in parts])
    utils = np.concatenate([u for _, u, _ in parts])
    values = np.concatenate([v for _, _, v in parts])
    width = store.config.chunk * (1 + store.config.states)
    lengths = np.bitwise_count(entries["alive"] & abi.ALIVE_MASK).astype(np.int64) * width
    starts = np.cumsum(lengths) - lengths
    pinned = (entries["alive"] & abi.PINNED) > 0
    order = np.lexsort((entries["key"], -utils.max(axis=1), ~pinned))
    pieces = [values[starts[i] : starts[i] + lengths[i]] for i in order]
    return entries[order], utils[order], np.concatenate(pieces)


def _set_clock(
    store: FiitedStore, engine: NativeEngine, clocks: list[Arrays], owned: npt.NDArray[np.uint8]
) -> None:
    first = clocks[0]
    engine.set_clock(
        np.array(first["integers"]), np.array(first["reals"]), np.array(first["window"])
    )
    if len(first["sketch"]) == len(engine.sketch()):  # another budget: candidates start afresh
        # A shard's cells outside its own buckets are zero, so the shards' sketches just add up.
        cells = np.bitwise_or.reduce([clock["sketch"] for clock in clocks])
        cells.reshape(abi.BUCKETS, -1)[owned == 0] = 0
        engine.set_sketch(cells)
    # Bytes are joined, not records: numpy drops a record's padding when it concatenates.
    queue = np.concatenate([clock["queue"] for clock in clocks]).view(abi.CANDIDATE)
    mine = owned[(queue["key"] >> np.uint64(52)).astype(np.int64)] > 0
    engine.set_queue(np.ascontiguousarray(queue[mine]))
    store.resume_at(int(first["integers"][0]))
    if all("totals" in clock for clock in clocks):  # absent in older ones: counts begin here
        _set_history(engine, clocks, owned)


def _set_history(engine: NativeEngine, clocks: list[Arrays], owned: npt.NDArray[np.uint8]) -> None:
    """Counts of every old shard go to one new shard, so that their sums stay what they were."""
    mine = [c for i, c in enumerate(clocks) if owned[i * abi.BUCKETS // len(clocks)]]
    totals = np.sum([c["totals"] for c in mine], axis=0, dtype=np.int64) if mine else 0
    signatures = np.maximum.reduce([clock["signatures"] for clock in clocks])
    engine.set_history(
        np.broadcast_to(totals, abi.HISTORY).copy(),
        np.maximum.reduce([clock["registers"] for clock in clocks]),  # sketches of a union
        np.where(owned, signatures, np.uint32(0)),
    )


def _native(store: FiitedStore) -> NativeEngine:
    if not isinstance(store.engine, NativeEngine) or store.dense:
        reason = "only compiled, pruned stores are saved"
        raise CapabilityError("checkpoints", reason, "Install a C++ compiler")
    return store.engine
