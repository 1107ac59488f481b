"""What a device remembers over restarts, in a folder that belongs to it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any

from actors.swan.lock import take_lock
from raysys.errors import DataError, InfeasibleError, StorageError

FILE, LOCK = "device.json", ".lock"
MODEL, UPDATE, CHECKPOINTS = "model.bin", "update.bin", "training"
REMEMBERED = 256


@dataclasses.dataclass(slots=True)
class Work:
    """A lease in hand and how far it has come.

    Args:
        expires_s: wall-clock time at which the lease ends unless it is renewed.
        stage: "leased", "planned", "downloaded", "trained".
    """

    gateway_address: str
    gateway: str
    epoch: int
    counter: int
    job_id: str
    round: int
    endpoint: str
    upload: str
    expires_s: float
    stage: str = "leased"
    plan: str = ""
    nonce: str = ""
    model_bytes: int = 0
    model_sha256: str = ""
    ticket: str = ""


@dataclasses.dataclass(slots=True)
class DeviceState:
    """Identity, enrolment, work in hand, and what was learned about this device."""

    device_id: str = ""
    token: str = ""
    token_until_s: float = 0.0
    gateways: list[str] = dataclasses.field(default_factory=list)
    attributes: list[str] = dataclasses.field(default_factory=list)
    schema_version: int = 1
    mean_sample_ms: float = 0.0
    sample_ms: float = 0.0
    loan: dict[str, float] = dataclasses.field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    done: list[str] = dataclasses.field(default_factory=list)
    work: Work | None = None


class StateFolder:
    """Loads and saves a :class:`DeviceState` atomically; holds the files of the work in hand.

    Raises:
        StorageError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise StorageError(str(folder), error.strerror or str(error), "Choose another") from (
                error
            )

    def lock(self) -> None:
        """Keep other processes out until :meth:`unlock`; a process that dies lets go.

        Raises:
            StorageError: another device works in this folder.
        """
        try:
            self._lock = take_lock(str(self.folder / LOCK))
        except InfeasibleError as error:
            remedy = "Give every device a state folder of its own"
            raise StorageError(str(self.folder), "another device works in it", remedy) from error

    def unlock(self) -> None:
        """Let others in; may be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self) -> DeviceState:
        """The state, or a fresh one with a random identity.

        Raises:
            DataError: the file is damaged.
        """
        path = self.folder / FILE
        if not path.exists():
            return DeviceState(device_id=secrets.token_bytes(16).hex())
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            work = values.pop("work", None)
            return DeviceState(**values, work=None if work is None else Work(**work))
        except (ValueError, TypeError) as error:
            remedy = "Remove the folder: the device then enrols anew"
            raise DataError(str(path), str(error), remedy) from error

    def save(self, state: DeviceState) -> None:
        """Replace the state; readers see the old or the new one."""
        state.done = state.done[-REMEMBERED:]
        text = json.dumps(dataclasses.asdict(state))
        self.write(FILE, text.encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all.

        Raises:
            StorageError: the disk refuses.
        """
        target = self.folder / name
        partial = self.folder / f".part-{name}"
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise StorageError(str(target), error.strerror or str(error), "Free space") from error

    def read(self, name: str) -> bytes:
        """A file's content; empty when there is none."""
        path = self.folder / name
        return path.read_bytes() if path.exists() else b""

    def clear_work(self) -> None:
        """Remove the files of the work in hand."""
        for name in (MODEL, UPDATE):
            (self.folder / name).unlink(missing_ok=True)
        for path in (self.folder / CHECKPOINTS).glob("*"):
            path.unlink(missing_ok=True)
