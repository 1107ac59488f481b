"""Who has enrolled: device ids, their client numbers, and the token each of them gets."""

from __future__ import annotations

import hmac
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.venn.security import TokenAuthority
from raysys.errors import ConfigError, DataError, InfeasibleError, StorageError
from raysys.runs.storage import Storage

FILE = "devices.jsonl"
DEVICE_ID_BYTES = 16
MOST_DESCRIPTION = 4096


@dataclass(slots=True)
class Registry:
    """Enrolled devices; kept in a folder when one is given.

    Args:
        code: what a device must show to enrol; empty lets everybody in who passes the transport.
        clients: client numbers that exist; a device may ask for one of them in its description.
        authority: issues tokens; None for a service that wants none.
    """

    code: str
    clients: int
    authority: TokenAuthority | None = None
    token_life_s: float = 30 * 86_400.0
    folder: str = ""
    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)
    _lowest: int = 0
    _told: int = 0
    _told_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.folder:
            return
        path = Path(self.folder) / FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                self._remember(str(row["id"]), int(row["client"]), float(row["sample_ms"]))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) - 1:  # torn: its device was never answered
                    good = "".join(f"{whole}\n" for whole in lines[:-1])
                    Storage(self.folder).write(FILE, good.encode())
                    break
                reason = f"line {number + 1}: {error}"
                raise DataError(str(path), reason, "Restore or remove it") from error

    @property
    def mean_sample_ms(self) -> float:
        """Mean time per sample of the devices that told theirs; 0 when none did."""
        return self._told_ms / self._told if self._told else 0.0

    def enrol(self, device: bytes, code: str, description: str, now_s: float) -> str:
        """Take a device in and return its token; a device may enrol again at any time.

        Raises:
            ConfigError: a wrong code, id or description. InfeasibleError: no client number is left.
        """
        if not hmac.compare_digest(code.encode(), self.code.encode()):
            raise ConfigError("code", "(hidden)", "this service's enrolment code")
        if len(device) != DEVICE_ID_BYTES:
            raise ConfigError("device_id", len(device), f"{DEVICE_ID_BYTES} bytes")
        facts = _facts(description)
        name = device.hex()
        held = self.devices.get(name)
        client = held["client"] if held else self._number(facts.get("client"))
        sample_ms: Any = facts.get("sample_ms")
        number = isinstance(sample_ms, (int, float)) and math.isfinite(sample_ms)
        told = float(sample_ms) if number and 0 < sample_ms < 1e7 else 0.0
        if held is None or held["sample_ms"] != told:
            self._keep(name, client, told)
            self._remember(name, client, told)
        if self.authority is None:
            return ""
        return self.authority.issue(name, "device", now_s, self.token_life_s)

    def client_of(self, device: bytes) -> int:
        """Client number of an enrolled device.

        Raises:
            InfeasibleError: it has not enrolled here.
        """
        found = self.devices.get(device.hex())
        if found is None:
            raise InfeasibleError("this device", "it has not enrolled", "Enrol first")
        return int(found["client"])

    def _number(self, wanted: Any) -> int:
        if isinstance(wanted, int) and 0 <= wanted < self.clients and wanted not in self._taken:
            return wanted
        while self._lowest in self._taken:
            self._lowest += 1
        if self._lowest >= self.clients:
            raise InfeasibleError("enrolment", f"all {self.clients} places are taken", "")
        return self._lowest

    def _remember(self, name: str, client: int, sample_ms: float) -> None:
        before = self.devices.get(name, {"sample_ms": 0.0})["sample_ms"]
        self._told += (sample_ms > 0) - (before > 0)
        self._told_ms += sample_ms - before
        self._taken.add(client)
        self.devices[name] = {"client": client, "sample_ms": sample_ms}

    def _keep(self, name: str, client: int, sample_ms: float) -> None:
        """Append to the file before the device is answered."""
        if not self.folder:
            return
        row = json.dumps({"id": name, "client": client, "sample_ms": sample_ms})
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with (Path(self.folder) / FILE).open("a", encoding="utf-8") as file:
                file.write(row + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(self.folder, reason, "Free space") from error


def _facts(description: str) -> dict[str, Any]:
    if len(description) > MOST_DESCRIPTION:
        raise ConfigError("description", len(description), f"at most {MOST_DESCRIPTION} bytes")
    try:
        facts = json.loads(description or "{}")
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ConfigError("description", "(text)", "a JSON object")
    return facts
