"""Reading cached activations ahead in sampler order (paper, section 4.4)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from raysys.training.kgt.store import BoundaryStore, IntArray

_POLL_S = 0.1


class Prefetcher:
    """A thread that reads the announced batches into a bounded queue.

    Args:
        batches: ids of the coming batches, in the order in which they will be asked for.
        depth: most batches held.
    """

    def __init__(self, store: BoundaryStore, batches: Sequence[IntArray], depth: int) -> None:
        self._store = store
        self._batches = list(batches)
        self._next = 0
        self._ready: queue.Queue[tuple[int, Tensor | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="kgt-prefetch", daemon=True)
        self._thread.start()

    def take(self, ids: IntArray) -> Tensor | None:
        """Rows of the next announced batch; None if the order differs or a row was not there."""
        while self._next < len(self._batches):
            if not self._thread.is_alive() and self._ready.empty():
                return None
            try:
                index, rows = self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            self._next = index + 1
            if np.array_equal(self._batches[index], ids):
                return rows
        return None

    def close(self) -> None:
        """End the thread; may be called twice."""
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        for index, ids in enumerate(self._batches):
            slots = self._store.slots(ids)
            rows = self._store.read(slots) if self._store.hits(slots).all() else None
            while not self._stop.is_set():
                try:
                    self._ready.put((index, rows), timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set():
                return
