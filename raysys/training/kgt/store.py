"""One memory-mapped file of activations at one module boundary.

    <directory>/<name>.rows    n x shape in fp16, bf16 or fp32, blocks reserved when created
    <directory>/<name>.valid   one byte per row, set only after the row is written
    <directory>/<name>.json    what the rows are: boundary, shape, dtype, version, fingerprint
    <directory>/lock           held by the job that uses the directory

Every id is used once per epoch, so nothing is ever evicted (paper, section 4.4); beyond a byte
budget a fixed random subset of the ids is kept.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.errors import StorageError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_BITS: dict[str, Any] = {"fp16": np.float16, "bf16": np.int16, "fp32": np.float32}
IntArray = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreKey:
    """What rows of a store mean; rows of another key are never read."""

    boundary: int
    version: int
    shape: tuple[int, ...]
    dtype: str
    fingerprint: str
    augmentation: str = "none"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * int(np.dtype(_BITS[self.dtype]).itemsize)

    @property
    def name(self) -> str:
        """File name of the store."""
        return f"boundary-{self.boundary}-v{self.version}-{self.dtype}"


class DirectoryLock:
    """Exclusive use of a cache directory by one process.

    Raises:
        StorageError: another job holds it, or the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / "lock").open("a+b")
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(str(directory), reason, "Choose another cache directory") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise StorageError(
                str(directory), "is used by another job", "Give each job its own cache directory"
            ) from None

    def close(self) -> None:
        """Release the directory; may be called twice."""
        self._file.close()


class BoundaryStore:
    """Rows of activations by example id.

    Args:
        ids: sorted unique ids of the whole data set (or of this worker's shard).
        budget_bytes: most bytes of rows; 0 keeps all ids.
        seed: draws the kept subset.
        fresh: start from nothing, whatever files a killed job has left.

    Raises:
        StorageError: the disk is full or read-only; nothing is left behind.
    """

    def __init__(
        self,
        directory: Path,
        key: StoreKey,
        ids: IntArray,
        budget_bytes: int = 0,
        seed: int = 0,
        *,
        fresh: bool = False,
    ) -> None:
        self.key = key
        self.directory = directory
        self.ids = _kept(ids, key.row_bytes, budget_bytes, seed)
        self._dense = _dense_index(self.ids)
        rows, valid = self._paths()[:2]
        manifest = {**dataclasses.asdict(key), "rows": len(self.ids)}
        manifest["ids_crc"] = int(np.bitwise_xor.reduce(self.ids * 2654435761 % 2**32, initial=0))
        if fresh:
            self.unlink()
        try:
            self._open(rows, valid, json.dumps(manifest, sort_keys=True))
        except OSError as error:
            self.unlink()
            reason = error.strerror or str(error)
            raise StorageError(str(directory), reason, "Free space, or set budget_bytes") from error

    def _open(self, rows: Path, valid: Path, manifest: str) -> None:
        described = self._paths()[2]
        known = described.read_text(encoding="utf-8") if described.is_file() else ""
        if known != manifest:
            # Rows of another data set, model or precision: start from nothing.
            for path in (described, valid, rows):
                path.unlink(missing_ok=True)
        _reserve(rows, max(1, len(self.ids) * self.key.row_bytes))
        _reserve(valid, max(1, len(self.ids)))
        described.write_text(manifest, encoding="utf-8")
        shape = (len(self.ids), math.prod(self.key.shape))
        self._rows = (
            np.memmap(rows, _BITS[self.key.dtype], "r+", shape=shape) if len(self.ids) else None
        )
        self._valid = np.memmap(valid, np.uint8, "r+", shape=(max(1, len(self.ids)),))

    def slots(self, ids: IntArray) -> IntArray:
        """Position of each id's row; -1 where the id is not kept."""
        if self._dense is not None:
            inside = (ids >= 0) & (ids < len(self._dense))
            found: IntArray = np.where(inside, self._dense[np.where(inside, ids, 0)], -1)
            return found
        at = np.searchsorted(self.ids, ids)
        at = np.minimum(at, max(0, len(self.ids) - 1))
        known = self.ids[at] == ids if len(self.ids) else np.zeros(len(ids), np.bool_)
        sparse: IntArray = np.where(known, at, -1)
        return sparse

    def hits(self, slots: IntArray) -> NDArray[np.bool_]:
        """Which slots hold a written row."""
        result: NDArray[np.bool_] = (slots >= 0) & (self._valid[np.maximum(slots, 0)] == 1)
        return result

    def read(self, slots: IntArray) -> Tensor:
        """Rows as float32 (N, *shape); every slot must be a hit."""
        assert self._rows is not None
        gathered = torch.from_numpy(self._rows[slots])
        if self.key.dtype == "bf16":
            gathered = gathered.view(torch.bfloat16)
        return gathered.to(torch.float32).view(len(slots), *self.key.shape)

    def write(self, slots: IntArray, rows: Tensor) -> None:
        """Store rows already rounded to the store's precision; slots of -1 are left out.

        Raises:
            StorageError: the disk failed.
        """
        kept = slots >= 0
        if self._rows is None or not kept.any():
            return
        lowered = rows.detach().to(DTYPES[self.key.dtype]).reshape(len(rows), -1)
        if self.key.dtype == "bf16":
            lowered = lowered.view(torch.int16)
        try:
            self._rows[slots[kept]] = lowered.numpy()[kept]
            self._valid[slots[kept]] = 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(str(self.directory), reason, "Free space") from error

    def valid(self) -> NDArray[np.uint8]:
        """A copy of the validity bytes, for a checkpoint."""
        return np.array(self._valid)

    def restore(self, valid: NDArray[np.uint8]) -> None:
        """Forget rows that a checkpoint did not know yet; rows lost since stay lost."""
        self._valid[:] = self._valid & valid

    def flush(self) -> None:
        """Bring rows and then validity to the disk."""
        if self._rows is not None:
            self._rows.flush()
        self._valid.flush()

    @property
    def used_bytes(self) -> int:
        """Bytes of written rows."""
        return int(self._valid.sum()) * self.key.row_bytes

    def unlink(self) -> None:
        """Delete the files; open readers keep their mapping until they let go."""
        for path in self._paths():
            path.unlink(missing_ok=True)

    def _paths(self) -> tuple[Path, Path, Path]:
        base = self.directory / self.key.name
        return (
            base.with_suffix(".rows"),
            base.with_suffix(".valid"),
            base.with_suffix(".json"),
        )


def delete_others(directory: Path, names: set[str]) -> None:
    """Delete the stores of a directory that are not in ``names``: a killed job left them.

    Raises:
        StorageError: a file cannot be deleted.
    """
    try:
        for path in directory.glob("boundary-*"):
            if path.suffix in (".rows", ".valid", ".json") and path.stem not in names:
                path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(directory), reason, "Make the cache directory writable") from error


def _reserve(path: Path, size: int) -> None:
    """Make the file's blocks exist: writing a sparse mapping on a full disk would kill us."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _kept(ids: IntArray, row_bytes: int, budget_bytes: int, seed: int) -> IntArray:
    limit = budget_bytes // row_bytes if budget_bytes else len(ids)
    if limit >= len(ids):
        return ids
    chosen = np.random.default_rng(seed).permutation(len(ids))[:limit]
    return np.sort(ids[chosen])


def _dense_index(ids: IntArray) -> IntArray | None:
    """Direct table from id to slot where ids are dense enough to afford one."""
    if not len(ids) or ids[0] < 0 or ids[-1] > 8 * len(ids) + 1024:
        return None
    table = np.full(int(ids[-1]) + 1, -1, np.int64)
    table[ids] = np.arange(len(ids))
    return table
