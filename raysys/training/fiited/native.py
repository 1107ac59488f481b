"""The compiled store: a typed face of ``kernels/fiited_store.cpp``.

Arrays are numpy, contiguous, and already checked (see ``store.py``); answers below zero become
typed errors here. The reference engine in ``raysys.ops.fiited_reference`` has the same methods.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from raysys.errors import CapabilityError
from raysys.ops import fiited_abi as abi
from raysys.ops.native import compile_and_load
from raysys.training.fiited.interface import raise_status, typed

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
AnyArray = npt.NDArray[Any]

LIBRARY = "fiited_store"
_ALL = 0xFFFFFFFFFFFFFFFF
_SPARE_BATCHES = 2


class Batch(Protocol):
    """What a lookup leaves behind for its update; opaque to everyone else."""

    @property
    def rows(self) -> int: ...


class SpareBatches:
    """Batches kept for reuse: each holds some MB of scratch that is dear to map anew."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._raws: list[int] = []

    def take(self) -> int:
        return self._raws.pop() if self._raws else int(self._library.fiited_batch_create())

    def give(self, raw: int) -> None:
        if len(self._raws) < _SPARE_BATCHES:
            self._raws.append(raw)
        else:
            self._library.fiited_batch_destroy(raw)

    def __del__(self) -> None:
        for raw in getattr(self, "_raws", ()):
            self._library.fiited_batch_destroy(raw)


class NativeBatch:
    """Owns one ``fiited::Batch``; with the object's end it goes back to ``spare``."""

    def __init__(self, library: ctypes.CDLL, spare: SpareBatches) -> None:
        self._library = library
        self._spare = spare
        self.raw = spare.take()

    @property
    def rows(self) -> int:
        """Distinct rows of the batch."""
        return int(self._library.fiited_batch_rows(self.raw))

    def __del__(self) -> None:
        if getattr(self, "raw", None):
            self._spare.give(self.raw)


class NativeEngine:
    """One store in compiled code. Calls are serialised; use in a forked child is refused.

    Raises:
        CapabilityError: no compiler, or the memory for the store could not be mapped.
    """

    name: Literal["native"] = "native"

    def __init__(
        self, config: abi.StoreConfig, tables: list[abi.TableConfig], isa: str | None = None
    ) -> None:
        self._library = typed(compile_and_load(LIBRARY, isa))
        self._tables = (abi.TableConfig * len(tables))(*tables)
        self._config = config
        self._spare = SpareBatches(self._library)
        self._raw = self._library.fiited_create(ctypes.byref(config), self._tables)
        if not self._raw:
            raise CapabilityError("memory for the store", "mapping failed", "Lower the budget")

    def __del__(self) -> None:
        if getattr(self, "_raw", None):
            self._library.fiited_destroy(self._raw)

    def close(self) -> None:
        """Give all memory back; later calls raise."""
        raw, self._raw = self._raw, None
        if raw:
            self._library.fiited_destroy(raw)

    def lookup(
        self,
        ids: I64,
        starts: I64,
        offsets: I64 | None,
        bags: int,
        mean: bool,
        weights: F32 | None,
        train: bool,
        mask_below: float,
        out: F32,
        columns: I64,
    ) -> NativeBatch:
        """Pool rows into ``out`` [bags, width]; see ``fiited_lookup`` for the layout."""
        batch = NativeBatch(self._library, self._spare)
        self._call(
            "fiited_lookup",
            batch.raw,
            _at(ids),
            _at(starts),
            _at(offsets),
            bags,
            int(mean),
            _at(weights),
            int(train),
            mask_below,
            _at(out),
            out.shape[1],
            _at(columns),
        )
        return batch

    def update(self, batch: Batch, grad: F32, lr: float, unit: float, strict: bool) -> int:
        """Fused backward; returns the rows rejected for gradients that are not finite."""
        assert isinstance(batch, NativeBatch)
        args = (batch.raw, _at(grad), grad.shape[1], lr, unit, int(strict))
        return self._call("fiited_update", *args)

    def end_step(self, slices: int, compact_rows: int) -> None:
        self._call("fiited_end_step", slices, compact_rows)

    def round(self) -> None:
        self._call("fiited_round")

    def compact(self, limit: int) -> int:
        return self._call("fiited_compact", limit)

    def histogram(self) -> tuple[I64, int]:
        """Scores by bin, and the number of chunks that this store may keep."""
        bins = np.empty(abi.BINS, np.int64)
        return bins, self._call("fiited_histogram", _at(bins))

    def collect(self, bin_: int, salt: int) -> tuple[F32, U64]:
        size = self._call("fiited_collect", bin_, salt, None, None, 0)
        scores, ties = np.empty(size, np.float32), np.empty(size, np.uint64)
        self._call("fiited_collect", bin_, salt, _at(scores), _at(ties), size)
        return scores, ties

    def plan(self, score: float, tie: int, salt: int) -> tuple[int, int, int]:
        """Chunks to grow, to evict, and alive now, for one cut."""
        sizes = np.zeros(2, np.int64)
        alive = self._call("fiited_plan", score, tie, salt, _at(sizes))
        return int(sizes[0]), int(sizes[1]), alive

    def planned(self, which: int, size: int) -> tuple[F32, U64]:
        scores, ties = np.empty(size, np.float32), np.empty(size, np.uint64)
        self._call("fiited_planned", which, _at(scores), _at(ties))
        return scores, ties

    def apply(self, grow: int, evict: int, elsewhere: int = 0) -> None:
        """Carry out a plan; ``elsewhere`` chunks live on the other shards afterwards."""
        self._call("fiited_apply", grow, evict, elsewhere)

    def set_elsewhere(self, chunks: int) -> None:
        """Chunks alive on the other shards of one budget."""
        self._call("fiited_elsewhere", chunks)

    def set_budget(self, slots: int, bytes_: int) -> None:
        self._call("fiited_set_budget", slots, bytes_)

    def freeze(self) -> None:
        self._call("fiited_freeze")

    def max_slots(self) -> int:
        return self._call("fiited_max_slots")

    def counters(self) -> dict[str, float]:
        out = abi.Counters()
        self._call("fiited_counters", ctypes.byref(out))
        return out.as_dict()

    def verify(self) -> int:
        return self._call("fiited_verify")

    def rows_seen(self, table: int) -> npt.NDArray[np.uint8]:
        """HyperLogLog registers of the rows that were not resident when they were seen."""
        registers = np.empty(4096, np.uint8)
        self._call("fiited_rows_seen", table, _at(registers))
        return registers

    def shape(self) -> tuple[I64, I64]:
        """Rows by length [tables, k + 1] and alive chunks by column [tables, k]."""
        tables, k = self._config.tables, self._config.max_chunks
        lengths, columns = np.empty((tables, k + 1), np.int64), np.empty((tables, k), np.int64)
        self._call("fiited_shape", _at(lengths), _at(columns))
        return lengths, columns

    def lengths_by_use(self) -> I64:
        """Rows [32, k + 1] by log2 of their optimizer steps (0 and 1 together) and by length."""
        counts = np.zeros((32, self._config.max_chunks + 1), np.int64)
        self._call("fiited_lengths_by_use", _at(counts))
        return counts

    def inspect(self, table: int, ids: I64) -> tuple[npt.NDArray[np.int32], F32, I64]:
        """Alive bitmap (-1 for strangers), utilities [n, k] and last touched step per id."""
        alive, touched = np.empty(len(ids), np.int32), np.empty(len(ids), np.int64)
        utils = np.empty((len(ids), self._config.max_chunks), np.float32)
        args = (_at(ids), len(ids), _at(alive), _at(utils), _at(touched))
        self._call("fiited_inspect", table, *args)
        return alive, utils, touched

    def pin(self, table: int, ids: I64, pin: bool) -> None:
        self._call("fiited_pin", table, _at(ids), len(ids), int(pin))

    def pull(self, keys: U64, tables: U16, train: bool) -> tuple[U16, F32]:
        """Alive bitmaps [n] and the alive chunks of all rows, one after the other."""
        alive = np.empty(len(keys), np.uint16)
        values = np.empty(len(keys) * self._config.max_chunks * self._config.chunk, np.float32)
        args = (_at(keys), _at(tables), len(keys), int(train), _at(alive), _at(values))
        return alive, values[: self._call("fiited_pull", *args)]

    def push(
        self,
        keys: U64,
        tables: U16,
        counts: U32,
        alive: U16,
        grads: F32,
        norms: F32,
        lr: float,
        unit: float,
    ) -> int:
        """One optimizer step per row from ragged gradients; returns rejected rows."""
        arrays = [_at(a) for a in (keys, tables, counts, alive, grads, norms)]
        return self._call("fiited_push", *arrays, len(keys), lr, unit)

    def export(self, low: int = 0, high: int = _ALL) -> tuple[AnyArray, F32, F32]:
        """Entries, utilities [n, k] and packed weights and states of a range of virtual rows."""
        floats = ctypes.c_int64()
        rows = self._call("fiited_count", low, high, ctypes.byref(floats))
        entries = np.empty(rows, abi.ENTRY)
        utils = np.empty((rows, self._config.max_chunks), np.float32)
        values = np.empty(floats.value, np.float32)
        self._call("fiited_export", low, high, _at(entries), _at(utils), _at(values), rows)
        return entries, utils, values

    def import_(
        self, entries: AnyArray, utils: F32, values: F32, owned: npt.NDArray[np.uint8]
    ) -> int:
        args = (_at(entries), _at(utils), _at(values), len(entries), _at(owned))
        return self._call("fiited_import", *args)

    def clock(self) -> tuple[I64, npt.NDArray[np.float64], F32]:
        integers, reals = np.zeros(3, np.int64), np.zeros(3, np.float64)
        window = np.empty(abi.BINS, np.float32)
        self._call("fiited_clock", 0, _at(integers), _at(reals), _at(window))
        return integers, reals, window

    def set_clock(self, integers: I64, reals: npt.NDArray[np.float64], window: F32) -> None:
        self._call("fiited_clock", 1, _at(integers), _at(reals), _at(window))

    def sketch(self) -> U32:
        cells = np.empty(self._call("fiited_sketch", 0, None, 0), np.uint32)
        self._call("fiited_sketch", 0, _at(cells), len(cells))
        return cells

    def set_sketch(self, cells: U32) -> None:
        self._call("fiited_sketch", 1, _at(cells), len(cells))

    def queue(self) -> AnyArray:
        """Candidates that wait for the next round (see ``abi.CANDIDATE``)."""
        items = np.zeros(self._call("fiited_queue", 0, None, 0), abi.CANDIDATE)
        self._call("fiited_queue", 0, _at(items), len(items))
        return items

    def set_queue(self, items: AnyArray) -> None:
        assert items.dtype == abi.CANDIDATE
        if len(items):
            self._call("fiited_queue", 1, _at(items), len(items))

    def history(self) -> dict[str, AnyArray]:
        """Totals, HyperLogLog registers [tables, 4096] and signatures of evicted rows [4096].

        Figures of the record: no later step depends on them.
        """
        totals = np.zeros(abi.HISTORY, np.int64)
        registers = np.zeros((self._config.tables, abi.BUCKETS), np.uint8)
        signatures = np.zeros(abi.BUCKETS, np.uint32)
        self._call("fiited_history", 0, _at(totals), _at(registers), _at(signatures))
        return {"totals": totals, "registers": registers, "signatures": signatures}

    def set_history(self, totals: I64, registers: AnyArray, signatures: U32) -> None:
        assert registers.size == self._config.tables * abi.BUCKETS
        self._call("fiited_history", 1, _at(totals), _at(registers), _at(signatures))

    def table_seeds(self) -> list[int]:
        return [int(table.seed) for table in self._tables]

    def virtual_rows(self, table: int, ids: I64) -> U64:
        """Virtual row of every id; the mapping is part of the checkpoint format."""
        out = np.empty(len(ids), np.uint64)
        spec = ctypes.byref(self._tables[table])
        self._library.fiited_virtual_rows(spec, _at(ids), len(ids), _at(out))
        return out

    def raw_ids(self, table: int, keys: U64) -> I64:
        """Ids of virtual rows (the mixer is a bijection)."""
        out = np.empty(len(keys), np.int64)
        spec = ctypes.byref(self._tables[table])
        self._library.fiited_raw_ids(spec, _at(keys), len(keys), _at(out))
        return out

    def _call(self, name: str, *args: Any) -> int:
        answer = int(getattr(self._library, name)(self._raw, *args))
        if answer < 0:
            raise_status(answer)
        return answer


def _at(array: AnyArray | None) -> int | None:
    return None if array is None else array.ctypes.data
