"""A serving table: read-only rows of their own lengths, fp32, bf16 or int8, in mapped files.

Rows lie sorted by (table, virtual row), values packed one after the other. Batches are answered
nearest-length first: rows of one length are gathered together, so that no row is padded in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check_choice
from raysys.errors import ConfigError, DataError, StorageError
from raysys.ops import fiited_abi as abi
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.native import F32, I64
from raysys.training.fiited.sharding.messages import from_wire, to_wire
from raysys.training.fiited.sharding.routing import BucketMap, Router
from raysys.training.fiited.store import FiitedStore

MANIFEST = "table.json"
FORMATS = ("fp32", "bf16", "int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How values are kept; int8 has one fp32 scale per chunk."""

    values: str = "bf16"

    def __post_init__(self) -> None:
        check_choice(self, "values", FORMATS)


def export_packed(store: FiitedStore, folder: str | Path, config: PackConfig) -> dict[str, Any]:
    """Write the resident rows of a store (shape "prefix") as a serving table.

    Returns:
        Its manifest.

    Raises:
        ConfigError: shape "free", whose rows have no length.
        StorageError: the folder cannot be written.
    """
    if store.config.shape != "prefix":
        raise ConfigError("shape", store.config.shape, "'prefix'", "Only prefixes have a length")
    entries, _, values = store.engine.export()
    chunk, states = store.config.chunk, store.config.states
    lengths = np.bitwise_count(entries["alive"] & abi.ALIVE_MASK).astype(np.int64)
    weights = values.reshape(-1, 1 + states, chunk)[:, 0]  # a chunk's weights, then its states
    order = np.lexsort((entries["key"], entries["table"]))
    starts = np.cumsum(lengths) - lengths
    picked = _ranges(starts[order], lengths[order])
    arrays: dict[str, npt.NDArray[Any]] = {
        "keys": entries["key"][order],
        "tables": entries["table"][order],
        "lengths": lengths[order].astype(np.uint8),
        **_encode(np.ascontiguousarray(weights[picked]), config.values),
    }
    manifest = {
        "format": "raysys-fiited-table", "version": 1, "values": config.values, "chunk": chunk,
        "seed": store.config.seed, "rows": len(entries), "chunks": int(lengths.sum()),
        "tables": [
            {"name": t.name, "dim": t.dim, "virtual_rows": t.virtual_rows, "seed": t.seed}
            for t in store.tables
        ],
    }  # fmt: skip
    return _write(Path(folder), manifest, arrays)


class PackedTable:
    """A serving table, opened; its arrays stay on disk until they are read.

    Raises:
        StorageError: it cannot be read.
        DataError: a file differs from the manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        manifest = _read_manifest(root)
        arrays = {name: _map(root, name, file) for name, file in manifest["files"].items()}
        self.manifest = manifest
        self.chunk = int(manifest["chunk"])
        self.tables = tuple(
            TableSpec(name=t["name"], dim=t["dim"], virtual_rows=t["virtual_rows"], seed=t["seed"])
            for t in manifest["tables"]
        )
        config = FiitedConfig(
            chunk=self.chunk, budget_slots=len(self.tables), seed=manifest["seed"], id_space="bits"
        )
        self._router = Router(config, self.tables, BucketMap.even(1))
        self._values, self._scales = arrays["values"], arrays.get("scales")
        self._lengths = np.asarray(arrays["lengths"])
        self._starts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths
        bounds = np.searchsorted(np.asarray(arrays["tables"]), np.arange(len(self.tables) + 1))
        self._keys = [arrays["keys"][low:high] for low, high in itertools.pairwise(bounds)]
        self._bounds = bounds

    def lookup(self, ids: I64) -> F32:
        """Vectors [B, sum of D_t] of ids [B, T]; zeros where a row or its tail was pruned."""
        routed = self._router.route(list(ids.T))
        rows = np.full(len(routed.keys), -1, np.int64)
        for table, keys in enumerate(self._keys):
            mine = np.flatnonzero(routed.tables == table)
            if not len(keys) or not len(mine):
                continue
            at = np.minimum(np.searchsorted(keys, routed.keys[mine]), len(keys) - 1)
            hit = keys[at] == routed.keys[mine]
            rows[mine[hit]] = at[hit] + self._bounds[table]
        widest = max(t.dim for t in self.tables)
        dense = np.zeros((len(rows), widest), np.float32)
        lengths = np.where(rows >= 0, self._lengths[rows], 0) if len(self._lengths) else rows * 0
        for length in np.unique(lengths[lengths > 0]):  # rows of one length together
            same = np.flatnonzero(lengths == length)
            chunks = self._starts[rows[same]][:, None] + np.arange(length)
            block = self._decode(chunks.reshape(-1))
            dense[same, : length * self.chunk] = block.reshape(len(same), -1)
        out = np.empty((len(ids), sum(t.dim for t in self.tables)), np.float32)
        low = 0
        for table, spec in enumerate(self.tables):
            part = routed.inverse[table * len(ids) : (table + 1) * len(ids)]
            out[:, low : low + spec.dim] = dense[part, : spec.dim]
            low += spec.dim
        return out

    def _decode(self, chunks: I64) -> F32:
        raw = np.asarray(self._values).reshape(-1, self.chunk)[chunks]
        if self._scales is not None:
            scales = np.asarray(self._scales)[chunks][:, None]
            return np.asarray(raw.astype(np.float32) * scales, np.float32)
        return from_wire(raw)


def _ranges(starts: I64, lengths: I64) -> I64:
    """starts[i] .. starts[i] + lengths[i] for every i, joined."""
    total = int(lengths.sum())
    offsets = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return np.asarray(np.arange(total, dtype=np.int64) + offsets, np.int64)


def _encode(weights: F32, values: str) -> dict[str, npt.NDArray[Any]]:
    if values == "fp32":
        return {"values": weights.reshape(-1)}
    if values == "bf16":
        return {"values": to_wire(weights, "bf16").reshape(-1)}
    scales = np.abs(weights).max(axis=1, initial=0.0) / 127 if len(weights) else np.zeros(0)
    safe = np.where(scales > 0, scales, 1.0)[:, None]
    quantised = np.rint(weights / safe).astype(np.int8)
    return {"values": quantised.reshape(-1), "scales": scales.astype(np.float32)}


def _write(root: Path, manifest: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, array in arrays.items():
            data = np.ascontiguousarray(array).tobytes()
            (root / f"{name}.bin").write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            files[name] = {"bytes": len(data), "sha256": digest, "dtype": str(array.dtype)}
        whole = manifest | {"files": files}
        (root / MANIFEST).write_text(json.dumps(whole, indent=1), encoding="utf-8")
    except OSError as error:
        raise StorageError(str(root), error.strerror or str(error), "Check the disk") from error
    return whole


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            str(path), error.strerror or str(error), "Give a serving table"
        ) from error
    except ValueError:
        raise DataError(str(path), "not JSON", "Export again") from None
    if not isinstance(found, dict) or found.get("format") != "raysys-fiited-table":
        raise DataError(str(path), "not a serving table", "Export again")
    if found.get("version") != 1:
        raise DataError(str(path), f"version {found.get('version')}, expected 1", "Export again")
    return found


def _map(root: Path, name: str, file: dict[str, Any]) -> npt.NDArray[Any]:
    path = root / f"{name}.bin"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error), "Export again") from error
    if len(data) != file["bytes"] or hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise DataError(str(path), "size or checksum differs", "Export again")
    dtype = np.dtype(file["dtype"])
    if not data:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
