"""Scores and accumulator snapshots as Parquet files with a schema version and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.errors import DataError, StorageError
from raysys.runs.storage import Storage
from raysys.training.ccs.accumulator import STATE
from raysys.training.ccs.table import ScoreTable

SCHEMA_VERSION = 1
_META = b"raysys.ccs"
ROW_GROUP_ROWS = 1_000_000


def write_scores(path: str, table: ScoreTable) -> None:
    """Write ``id``, ``label`` and one column per score; features are not written.

    Raises:
        StorageError: the place is read-only or the disk is full; an old file stays whole.
    """
    columns: dict[str, Any] = {"id": table.ids}
    if table.labels is not None:
        columns["label"] = table.labels
    columns.update(table.scores)
    _write(path, columns, {"kind": "scores", "fingerprint": table.fingerprint()})


def read_scores(path: str) -> ScoreTable:
    """Read a score file and check that it is whole.

    Raises:
        StorageError: the file cannot be read.
        DataError: truncated, of another schema version, or its rows do not match its fingerprint.
        ConfigError: what :class:`ScoreTable` rejects.
    """
    content, meta = read_parquet(path, "scores")
    columns = {name: content[name].to_numpy() for name in content.column_names}
    if "id" not in columns:
        raise DataError(path, "has no column 'id'", "Write it with write_scores")
    ids = columns.pop("id")
    labels = columns.pop("label", None)
    scores = {name: values.astype(np.float64) for name, values in columns.items()}
    table = ScoreTable(ids, scores, labels)
    if meta.get("fingerprint") not in (None, table.fingerprint()):
        raise DataError(path, "rows do not match the file's fingerprint", "Score the data again")
    return table


def write_snapshot(path: str, state: dict[str, Any]) -> None:
    """Write an accumulator's ``state_dict`` (see :class:`ScoreAccumulator`)."""
    meta = {"kind": "snapshot", "committed_epoch": state["committed_epoch"]}
    _write(path, {"id": state["ids"], **state["columns"]}, meta)


def read_snapshot(path: str) -> dict[str, Any]:
    """Read what :func:`write_snapshot` wrote.

    Raises:
        StorageError, DataError: as :func:`read_scores`.
    """
    content, meta = read_parquet(path, "snapshot")
    missing = [name for name in ("id", *STATE) if name not in content.column_names]
    if missing:
        raise DataError(path, f"lacks the columns {missing}", "Start the scoring run again")
    columns = {name: content[name].to_numpy() for name in STATE}
    ids = content["id"].to_numpy()
    return {"ids": ids, "columns": columns, "committed_epoch": meta["committed_epoch"]}


def read_parquet(path: str, kind: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read one of our Parquet files with its metadata."""
    storage, name = split(path)
    raw = storage.read(name)
    try:
        content = pq.read_table(pa.BufferReader(raw))
    except pa.ArrowException as error:
        raise DataError(path, f"not a whole Parquet file ({error})", "Write it again") from None
    meta = parse_meta(path, content.schema.metadata)
    if meta.get("kind") != kind:
        raise DataError(path, f"holds {meta.get('kind')!r}, not {kind!r}", "Give the right file")
    return content, meta


def parse_meta(path: str, metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Our metadata of a Parquet schema, its version checked.

    Raises:
        DataError: there is none, or it is of another version.
    """
    raw = (metadata or {}).get(_META)
    meta: dict[str, Any] = json.loads(raw) if raw else {}
    if meta.get("version") != SCHEMA_VERSION:
        found = meta.get("version", "none")
        reason = f"schema version {found}, this release reads {SCHEMA_VERSION}"
        raise DataError(path, reason, "Write the file with this release")
    return meta


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes, as hex."""
    storage, name = split(path)
    return hashlib.sha256(storage.read(name)).hexdigest()


def split(path: str) -> tuple[Storage, str]:
    """A file's folder as storage, and its name."""
    pure = PurePosixPath(path)
    if not pure.name:
        raise StorageError(path, "is no file name", "Give a path to a file")
    parent = path[: -len(pure.name)].rstrip("/") or ("/" if path.startswith("/") else ".")
    return Storage(parent), pure.name


def with_meta(table: pa.Table, meta: dict[str, Any]) -> pa.Table:
    """Attach our metadata to an Arrow table."""
    text = json.dumps({"version": SCHEMA_VERSION, **meta}, sort_keys=True)
    return table.replace_schema_metadata({_META: text.encode()})


def _write(path: str, columns: dict[str, Any], meta: dict[str, Any]) -> None:
    storage, name = split(path)
    content = with_meta(pa.table(columns), meta)
    with storage.writer(name) as file:
        pq.write_table(content, file, row_group_size=ROW_GROUP_ROWS)
