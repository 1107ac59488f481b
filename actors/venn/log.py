"""The scheduler's memory: an append-only log of commands, snapshots, and the leader's lock.

A record is one line ``crc32 json``. Segments are named after their first record; a snapshot holds
the state after its record. The lock is held by the leader's process and freed by the kernel when
the process dies, however it dies, so that there are never two writers on one host.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raysys.errors import DataError, StorageError
from raysys.federated.venn.scheduler import SchedulerCore

KEPT_SNAPSHOTS = 2
# A record takes up to a millisecond to apply: what a standby has to catch up with stays short.
SNAPSHOT_EVERY = 500
_TRIES = 5


class LeaderLock:
    """Exclusive lock on a state folder."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / "leader.lock", os.O_CREAT | os.O_RDWR, 0o600)

    def acquire(self) -> bool:
        """Take the lock if nobody has it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give the lock up; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Replica:
    """A scheduler core that follows the log in a folder.

    Raises:
        StorageError: the folder cannot be used.
    """

    def __init__(self, folder: Path, core: SchedulerCore) -> None:
        self.folder = folder
        self.core = core
        self.applied = 0
        self._segment: Path | None = None
        self._offset = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                str(folder), error.strerror or str(error), "Choose another"
            ) from error

    def catch_up(self) -> int:
        """Apply what was logged since the last call; returns the number of records.

        Raises:
            DataError: a record is damaged in the middle of the log, or records are missing.
        """
        before = self.applied
        for _ in range(_TRIES):
            try:
                self._follow()
                break
            except FileNotFoundError:
                continue  # the leader has just replaced the file by a newer snapshot
        return self.applied - before

    def _follow(self) -> None:
        starts = _numbered(self.folder, "log-", ".jsonl")
        if (starts and self.applied + 1 < starts[0]) or not self.applied:
            self._load_snapshot()
        for start in starts:
            path = self.folder / f"log-{start}.jsonl"
            if self._segment is not None and start < _start(self._segment):
                continue
            if path != self._segment:
                if start > self.applied + 1:
                    reason = f"records {self.applied + 1} to {start - 1} are missing"
                    raise DataError(str(path), reason, "Restore the older segments")
                self._segment, self._offset = path, 0
            self._read(path)

    def _load_snapshot(self) -> None:
        for number in reversed(_numbered(self.folder, "snapshot-", ".json")):
            if number <= self.applied:
                return
            text = (self.folder / f"snapshot-{number}.json").read_text(encoding="utf-8")
            self.core.load(text)
            self.applied, self._segment, self._offset = number, None, 0
            return

    def _read(self, path: Path) -> None:
        with path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        for number, command, size in _records(data, path):
            if number > self.applied:
                self.core.apply(command)
                self.core.events.clear()
                self.applied = number
            self._offset += size


class Journal(Replica):
    """The leader's replica: it also writes. Open only with the lock held."""

    def __init__(
        self, folder: Path, core: SchedulerCore, snapshot_every: int = SNAPSHOT_EVERY
    ) -> None:
        super().__init__(folder, core)
        self._every = snapshot_every
        self._since = 0
        self._descriptor = -1

    @classmethod
    def promote(cls, replica: Replica, snapshot_every: int = SNAPSHOT_EVERY) -> Journal:
        """Turn a follower into the writer, after a last look at the log."""
        replica.catch_up()
        journal = cls(replica.folder, replica.core, snapshot_every)
        journal.applied = replica.applied
        journal._rotate()
        return journal

    def commit(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Apply a command and log it; a refused command raises and leaves no trace."""
        reply = self.core.apply(command)
        self.applied += 1
        body = json.dumps([self.applied, command], separators=(",", ":")).encode()
        os.write(self._descriptor, b"%08x %s\n" % (zlib.crc32(body), body))
        self._since += 1
        if self._since >= self._every:
            self.snapshot()
        return reply

    def snapshot(self) -> Path:
        """Write the state, start a new segment, and drop what two snapshots ago needed."""
        path = self.folder / f"snapshot-{self.applied}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self.core.dump(), encoding="utf-8")
        temporary.replace(path)
        self._rotate()
        snapshots = _numbered(self.folder, "snapshot-", ".json")
        for number in snapshots[:-KEPT_SNAPSHOTS]:
            (self.folder / f"snapshot-{number}.json").unlink(missing_ok=True)
        oldest = snapshots[-KEPT_SNAPSHOTS:][0]
        segments = _numbered(self.folder, "log-", ".jsonl")
        for start, following in itertools.pairwise(segments):
            if following <= oldest + 1:
                (self.folder / f"log-{start}.jsonl").unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Close the segment; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _rotate(self) -> None:
        self.close()
        self._segment = self.folder / f"log-{self.applied + 1}.jsonl"
        # A torn tail can only belong to a record that was never acknowledged: write over it.
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND
        self._descriptor = os.open(self._segment, flags, 0o600)
        self._since = 0


def _records(data: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Complete records with their size in bytes; stops before a torn tail."""
    lines = data.split(b"\n")
    for place, line in enumerate(lines[:-1]):
        checksum, _, body = line.partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(body):
                raise ValueError("checksum")
            number, command = json.loads(body)
        except ValueError as error:
            if place == len(lines) - 2:
                return
            raise DataError(str(path), f"damaged record {place}", "Restore the file") from error
        yield number, command, len(line) + 1


def _numbered(folder: Path, prefix: str, suffix: str) -> list[int]:
    names = (path.name for path in folder.glob(f"{prefix}*{suffix}"))
    return sorted(int(name[len(prefix) : -len(suffix)]) for name in names)


def _start(path: Path) -> int:
    return int(path.name[len("log-") : -len(".jsonl")])
