"""The activation cache: what the frozen prefix gave for an example is read instead of computed.

Paper, section 4.4. Ours: when the boundary moves forward, old rows are valid inputs of the newly
frozen modules and are converted on first touch; a byte budget mixes read and computed rows in one
batch; rows are rounded to the stored precision on a miss too, so that training does not depend on
what happened to be cached. Anything that goes wrong turns the cache off, never the training.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysys.errors import ConfigError, StorageError
from raysys.training.kgt.config import CacheConfig
from raysys.training.kgt.prefetch import Prefetcher
from raysys.training.kgt.store import (
    DTYPES,
    BoundaryStore,
    DirectoryLock,
    IntArray,
    StoreKey,
    delete_others,
)

# (inputs, upto, h, start) -> output of modules start .. upto - 1
Compute = Callable[[Sequence[Tensor], int, Tensor | None, int], Tensor]
_PROBES = 3
_FP16_MAX = 65_504.0


@dataclasses.dataclass(slots=True)
class CacheStats:
    """Counts since the start; seconds are CPU seconds of the calling thread's process."""

    hits: int = 0
    misses: int = 0
    converted: int = 0
    prefetched: int = 0
    read_s: float = 0.0
    compute_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Rows read over rows asked for."""
        return self.hits / max(1, self.hits + self.misses)


class ActivationCache:
    """Serves the output of the frozen prefix by example id.

    Args:
        config: directory, budget, precision, read-ahead.
        ids: ids of all examples of this worker.
        fingerprint: of the data set; rows of another one are dropped.
        augmentation: the view policy, part of the key.

    Raises:
        StorageError: the directory is in use or cannot be written.
        ConfigError: no ids, or no directory.
    """

    def __init__(
        self,
        config: CacheConfig,
        ids: IntArray,
        fingerprint: str,
        *,
        augmentation: str = "none",
        seed: int = 0,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        if not config.directory:
            raise ConfigError("cache.directory", config.directory, "a folder")
        if not len(ids):
            raise ConfigError("ids", ids, "at least one example id")
        self.config = config
        self.stats = CacheStats()
        self.off_reason = ""
        self._ids = np.unique(np.asarray(ids, np.int64))
        self._fingerprint = fingerprint
        self._augmentation = augmentation
        self._seed = seed
        self._clock = clock
        self._lock = DirectoryLock(Path(config.directory))
        self._stores: list[BoundaryStore] = []
        # A checkpoint is worth its rows: what the last two describe (the newest may not have
        # reached the disk) outlives its use, else a run that resumes computes rows in other
        # batches, and their last bits differ.
        self._described: deque[set[str]] = deque(maxlen=2)
        self._retired: list[BoundaryStore] = []
        self._boundary = 0
        # Boundaries since the last release, each with its precision: rows are rounded at every one
        # of them, so that converted and computed rows are the same.
        self._path: dict[int, str] = {}
        self._version = 0
        self._checksums: dict[int, int] = {}
        self._turn = 0
        self._probes: list[tuple[float, float]] = []
        self._paused = False
        self._writer = ThreadPoolExecutor(1) if config.write_queue else None
        self._pending: deque[Future[None]] = deque()
        self._prefetcher: Prefetcher | None = None

    @property
    def active(self) -> bool:
        """Whether rows are read and written at the current boundary."""
        return bool(self._boundary) and not self.off_reason and not self._paused

    @property
    def used_bytes(self) -> int:
        """Bytes of rows on disk, those that only checkpoints may still need included."""
        return sum(store.used_bytes for store in [*self._stores, *self._retired])

    def move(self, boundary: int) -> None:
        """The frozen prefix is now modules ``0 .. boundary - 1``; 0 forgets everything."""
        if boundary == self._boundary:
            return
        self.drain()
        self._stop_reading_ahead()
        if boundary < self._boundary:
            self._version += 1
            self._drop(self._stores)
            self._stores = []
            self._path = {}
        else:
            # One older boundary is worth keeping: its rows are inputs of the new modules.
            self._drop(self._stores[:-1])
            self._stores = self._stores[-1:]
        self._boundary = boundary
        if boundary:
            self._path[boundary] = self.config.dtype
        self._probes, self._paused = [], False

    def gather(self, ids: IntArray, inputs: Sequence[Tensor], compute: Compute) -> Tensor:
        """Output of the frozen prefix for a batch, float32 (N, *shape), without gradients.

        Args:
            ids: one per row of the batch.
            inputs: the model's inputs for the batch.
            compute: runs modules of the prefix.
        """
        if not self.active:
            return self._computed(inputs, compute)
        try:
            return self._gather(ids, inputs, compute)
        except StorageError as error:
            self.turn_off(str(error))
            return self._computed(inputs, compute)

    def _computed(
        self, inputs: Sequence[Tensor], compute: Compute, h: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Run the prefix from ``start`` on, rounding at each boundary of the path."""
        value, at = h, start
        for boundary in sorted(self._path):
            if boundary > at:
                value = self._rounded(compute(inputs, boundary, value, at), boundary)
                at = boundary
        assert value is not None
        return value

    def _gather(self, ids: IntArray, inputs: Sequence[Tensor], compute: Compute) -> Tensor:
        store = self._current()
        if store is None:
            return self._compute_and_keep(ids, inputs, compute)
        slots = store.slots(ids)
        hit = store.hits(slots)
        if hit.all():
            if not self._same_inputs(ids, inputs):
                return self._computed(inputs, compute)
            return self._read(store, ids, slots)
        if not hit.any():
            return self._compute_and_keep(ids, inputs, compute)
        missing = torch.from_numpy(np.flatnonzero(~hit))
        some = [value[missing] for value in inputs]
        computed = self._compute_and_keep(ids[~hit], some, compute)
        out = torch.empty(len(ids), *computed.shape[1:])
        out[missing] = computed
        out[torch.from_numpy(np.flatnonzero(hit))] = store.read(slots[hit])
        self.stats.hits += int(hit.sum())
        return out

    def _read(self, store: BoundaryStore, ids: IntArray, slots: IntArray) -> Tensor:
        start = self._clock()
        ahead = self._prefetcher.take(ids) if self._prefetcher is not None else None
        rows = store.read(slots) if ahead is None else ahead
        self.stats.prefetched += ahead is not None
        self.stats.hits += len(ids)
        self.stats.read_s += self._clock() - start
        return rows

    def _compute_and_keep(
        self, ids: IntArray, inputs: Sequence[Tensor], compute: Compute
    ) -> Tensor:
        start = self._clock()
        older = self._older()
        rows: Tensor | None = None
        if older is not None:
            slots = older.slots(ids)
            if older.hits(slots).all():
                begin = older.key.boundary
                rows = self._computed(inputs, compute, older.read(slots), begin)
                self.stats.converted += len(ids)
        if rows is None:
            rows = self._computed(inputs, compute)
        spent = self._clock() - start
        self.stats.misses += len(ids)
        self.stats.compute_s += spent
        self._keep(ids, inputs, rows, spent)
        return rows

    def _keep(self, ids: IntArray, inputs: Sequence[Tensor], rows: Tensor, spent: float) -> None:
        store = self._current() or self._new_store(rows)
        shape = tuple(rows.shape[1:])
        if shape != store.key.shape:
            reason = f"rows of shape {shape} after rows of shape {store.key.shape}"
            raise StorageError(self.config.directory, reason, "Pad examples to one length")
        slots = store.slots(ids)
        first = inputs[0].detach().contiguous().numpy()
        for row, key in enumerate(ids.tolist()):
            self._checksums[key] = zlib.crc32(first[row].data)
        if self._writer is None:
            store.write(slots, rows)
        else:
            while len(self._pending) >= self.config.write_queue:
                self._pending.popleft().result()
            self._pending.append(self._writer.submit(store.write, slots, rows))
        if len(self._probes) < _PROBES and (slots >= 0).all():
            self._probe(store, slots, spent)

    def _probe(self, store: BoundaryStore, slots: IntArray, compute_s: float) -> None:
        """Time a read of what was just computed; pause the cache where reading does not pay."""
        self.drain()
        start = self._clock()
        store.read(slots)
        self._probes.append((self._clock() - start, compute_s))
        if len(self._probes) == _PROBES:
            read_s = statistics.median(read for read, _ in self._probes)
            forward_s = statistics.median(spent for _, spent in self._probes)
            self._paused = read_s >= self.config.pays_below * forward_s

    def _same_inputs(self, ids: IntArray, inputs: Sequence[Tensor]) -> bool:
        """Check one row per batch, in turn, against the input that its activation came from."""
        self._turn += 1
        row = self._turn % len(ids)
        value = inputs[0][row].detach().contiguous().numpy()
        if self._checksums.get(int(ids[row]), -1) == zlib.crc32(value.data):
            return True
        self.turn_off(
            f"example {int(ids[row])} has another input than when it was cached: the data set "
            "changed, or its transform is random"
        )
        return False

    def _rounded(self, rows: Tensor, boundary: int) -> Tensor:
        if self._path[boundary] == "fp16" and float(rows.abs().amax()) > _FP16_MAX:
            self._path[boundary] = "bf16"
            self._drop([store for store in self._stores if store.key.boundary == boundary])
            self._stores = [s for s in self._stores if s.key.boundary != boundary]
            self._stop_reading_ahead()
        return rows.to(DTYPES[self._path[boundary]]).to(torch.float32)

    def _current(self) -> BoundaryStore | None:
        newest = self._stores[-1] if self._stores else None
        return newest if newest is not None and newest.key.boundary == self._boundary else None

    def _older(self) -> BoundaryStore | None:
        oldest = self._stores[0] if self._stores else None
        return oldest if oldest is not None and oldest.key.boundary < self._boundary else None

    def _new_store(self, rows: Tensor) -> BoundaryStore:
        shape, dtype = tuple(rows.shape[1:]), self._path[self._boundary]
        return self._open_store(shape, dtype, self._boundary, fresh=True)

    def _open_store(
        self, shape: tuple[int, ...], dtype: str, boundary: int, *, fresh: bool = False
    ) -> BoundaryStore:
        key = StoreKey(
            boundary=boundary,
            version=self._version,
            shape=shape,
            dtype=dtype,
            fingerprint=self._fingerprint,
            augmentation=self._augmentation,
        )
        store = BoundaryStore(
            Path(self.config.directory),
            key,
            self._ids,
            self.config.budget_bytes,
            self._seed,
            fresh=fresh,
        )
        self._stores.append(store)
        return store

    def read_ahead(self, batches: Sequence[IntArray]) -> None:
        """Announce the ids of the coming batches, in order; a thread reads them ahead."""
        self._stop_reading_ahead()
        store = self._current()
        if self.config.prefetch_batches and store is not None and self.active:
            self._prefetcher = Prefetcher(store, batches, self.config.prefetch_batches)

    def _stop_reading_ahead(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def turn_off(self, reason: str) -> None:
        """Use the cache no more; training goes on by computing."""
        self.off_reason = reason
        self._stop_reading_ahead()
        self._described.clear()
        self._drop(self._stores)
        self._stores = []
        self._sweep()

    def _drop(self, stores: Sequence[BoundaryStore]) -> None:
        self._retired += stores
        self._sweep()

    def _sweep(self) -> None:
        """Delete retired rows that no checkpoint needs."""
        needed = set[str]().union(*self._described)
        for store in self._retired:
            if store.key.name not in needed:
                store.unlink()
        self._retired = [store for store in self._retired if store.key.name in needed]

    def drain(self) -> None:
        """Wait for rows that are still being written."""
        while self._pending:
            self._pending.popleft().result()

    def state_dict(self) -> dict[str, Any]:
        """Bring rows to the disk and describe them, for a checkpoint."""
        self.drain()
        for store in self._stores:
            store.flush()
        self._described.append({store.key.name for store in self._stores})
        self._sweep()
        return {
            "boundary": self._boundary,
            "version": self._version,
            "path": dict(self._path),
            "paused": self._paused,
            "probes": list(self._probes),
            "turn": self._turn,
            "off_reason": self.off_reason,
            "checksums": dict(self._checksums),
            # Tensors, not arrays: a checkpoint is read as tensors and plain values only.
            "stores": [
                (dataclasses.asdict(s.key), torch.from_numpy(s.valid())) for s in self._stores
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's rows; rows that are gone are computed again."""
        self._boundary, self._version = state["boundary"], state["version"]
        self._paused, self._probes = state["paused"], list(state["probes"])
        self._turn, self.off_reason = state["turn"], state["off_reason"]
        self._checksums = dict(state["checksums"])
        for key, valid in state["stores"]:
            store = self._open_store(tuple(key["shape"]), key["dtype"], key["boundary"])
            store.restore(valid.numpy())
        self._path = dict(state["path"])
        self._described.append({store.key.name for store in self._stores})
        delete_others(Path(self.config.directory), self._described[-1])

    def close(self, *, keep: bool = False) -> None:
        """Release the directory; rows are deleted unless ``keep``. May be called twice."""
        self._stop_reading_ahead()
        if self._writer is not None:
            self.drain()
            self._writer.shutdown()
            self._writer = None
        if not keep:
            self._described.clear()
            self._drop(self._stores)
        self._stores, self._retired = [], []
        self._boundary = 0
        self._lock.close()
