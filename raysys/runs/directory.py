"""One run, one directory.

<run>/manifest.json            job, config, seeds, versions, host, status
<run>/tables/<name>/*.parquet  metrics, events and any further table, in append-only parts
<run>/checkpoints/<step>/      files of one checkpoint; complete, or absent
<run>/report.html, *.json      results
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys import machine
from raysys.errors import ConfigError, DataError, StorageError
from raysys.runs.manifest import Manifest, Status
from raysys.runs.storage import Storage

MANIFEST = "manifest.json"
STEP_DIGITS = 12


class RunDirectory:
    """Reads and writes one run; use :meth:`create` or :meth:`open`."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest

    @property
    def uri(self) -> str:
        """Where the run lies, as the user gave it."""
        return self.storage.uri

    @classmethod
    def create(
        cls, uri: str, *, job: str, config: Mapping[str, Any], seeds: Sequence[int], now: str
    ) -> RunDirectory:
        """Start a run in an empty or new folder.

        Args:
            now: the current time in ISO 8601 (the library has no clock of its own).

        Raises:
            StorageError: the folder already holds a run, is not writable, or the disk is full.
        """
        storage = Storage(uri)
        if storage.exists(MANIFEST):
            raise StorageError(
                uri, "already holds a run", "Give another --run-dir, or --resume this one"
            )
        manifest = Manifest(
            job=job,
            config=config,
            seeds=list(seeds),
            host=machine.describe(),
            status="running",
            started_at=now,
        )
        storage.write(MANIFEST, manifest.to_json())
        return cls(storage, manifest)

    @classmethod
    def open(cls, uri: str) -> RunDirectory:
        """Open an existing run.

        Raises:
            StorageError: there is no run.
            DataError: its manifest is damaged.
        """
        storage = Storage(uri)
        if not storage.exists(MANIFEST):
            raise StorageError(uri, "holds no run (no manifest.json)", "Check the path")
        return cls(storage, Manifest.from_json(storage.read(MANIFEST), f"{uri}/{MANIFEST}"))

    def set_status(self, status: Status, now: str | None, error: str | None = None) -> None:
        """Record the state of the run in its manifest."""
        self.manifest = dataclasses.replace(self.manifest, status=status, ended_at=now, error=error)
        self.storage.write(MANIFEST, self.manifest.to_json())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; NaN is refused since other readers cannot parse it."""
        text = json.dumps(value, indent=2, allow_nan=False)
        self.storage.write(name, text.encode())

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run.

        Raises:
            StorageError: it is missing.
            DataError: it is damaged.
        """
        content = self.storage.read(name)
        try:
            return json.loads(content)
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}", f"damaged JSON ({error})", "") from error

    def append_rows(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to a table as one more Parquet part; nothing is written for no rows."""
        if rows:
            self.append_table(table, pa.Table.from_pylist([dict(row) for row in rows]))

    def append_table(self, table: str, content: pa.Table) -> None:
        """Append an Arrow table as one more Parquet part."""
        _check_name("table", table)
        part = len(self.storage.names(f"tables/{table}"))
        name = f"tables/{table}/{part:06d}-{uuid.uuid4().hex[:8]}.parquet"
        with self.storage.writer(name) as file:
            pq.write_table(content, file)

    def read_table(self, table: str) -> pa.Table:
        """All parts of a table in order, columns merged.

        Raises:
            StorageError: the run has no such table.
            DataError: a part is damaged.
        """
        folder = f"tables/{table}"
        names = self.storage.names(folder)
        if not names:
            raise StorageError(f"{self.uri}/{folder}", "holds no data", "Has the run recorded any?")
        parts = []
        for name in names:
            content = pa.BufferReader(self.storage.read(f"{folder}/{name}"))
            try:
                parts.append(pq.read_table(content))
            except pa.ArrowException as error:
                raise DataError(f"{self.uri}/{folder}/{name}", str(error), "") from error
        return pa.concat_tables(parts, promote_options="permissive")

    def tables(self) -> list[str]:
        """Names of the tables."""
        return self.storage.names("tables")

    def save_checkpoint(self, step: int, files: Mapping[str, bytes], *, keep: int = 2) -> None:
        """Save a checkpoint; it exists only once complete. Older ones beyond ``keep`` are deleted.

        Args:
            step: non-negative; a checkpoint of the same step is replaced.
            files: name -> content, with at least one file.
            keep: how many of the newest to keep, at least 1.
        """
        if step < 0 or not files or keep < 1:
            raise ConfigError("checkpoint", (step, len(files), keep), "step >= 0, files, keep >= 1")
        folder = f"checkpoints/{step:0{STEP_DIGITS}d}"
        temporary = f"checkpoints/.part-{uuid.uuid4().hex}"
        try:
            for name, content in files.items():
                _check_name("file", name)
                self.storage.write(f"{temporary}/{name}", content)
            self.storage.delete_folder(folder)
            self.storage.rename(temporary, folder)
        except StorageError:
            self.storage.delete_folder(temporary)
            raise
        for old in self.checkpoints()[:-keep]:
            self.storage.delete_folder(f"checkpoints/{old:0{STEP_DIGITS}d}")

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = self.storage.names("checkpoints")
        return [int(name) for name in names if name.isdecimal()]

    def load_checkpoint(self, step: int | None = None) -> tuple[int, dict[str, bytes]] | None:
        """Return ``(step, files)`` of a checkpoint, the newest by default; None when there is none.

        Raises:
            StorageError: the step that was asked for does not exist.
        """
        steps = self.checkpoints()
        if step is None:
            if not steps:
                return None
            step = steps[-1]
        folder = f"checkpoints/{step:0{STEP_DIGITS}d}"
        if step not in steps:
            raise StorageError(f"{self.uri}/{folder}", "no such checkpoint", f"There are {steps}")
        names = self.storage.names(folder)
        return step, {name: self.storage.read(f"{folder}/{name}") for name in names}


def _check_name(kind: str, name: str) -> None:
    allowed = name and not name.startswith(".") and "/" not in name and "\\" not in name
    if not allowed:
        raise ConfigError(kind, name, "a plain name without slashes or a leading dot")
