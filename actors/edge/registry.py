"""Who has enrolled: device ids, their client numbers, and the token each of them gets."""

from __future__ import annotations

import hmac
import json
import math
from dataclasses import dataclass, field
from typing import Any

from actors.venn.security import TokenAuthority
from raysys.errors import ConfigError, DataError, InfeasibleError, StorageError
from raysys.runs.storage import Storage

FILE = "devices.json"
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

    def __post_init__(self) -> None:
        if not self.folder:
            return
        storage = Storage(self.folder)
        if storage.exists(FILE):
            try:
                self.devices = dict(json.loads(storage.read(FILE)))
            except ValueError as error:
                raise DataError(f"{self.folder}/{FILE}", str(error), "Restore or remove it") from (
                    error
                )

    @property
    def mean_sample_ms(self) -> float:
        """Mean time per sample of the devices that told theirs; 0 when none did."""
        told = [d["sample_ms"] for d in self.devices.values() if d.get("sample_ms", 0) > 0]
        return math.fsum(told) / len(told) if told else 0.0

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
        sample_ms = float(facts.get("sample_ms", 0.0))
        told = sample_ms if math.isfinite(sample_ms) and 0 < sample_ms < 1e7 else 0.0
        self.devices[name] = {"client": client, "sample_ms": told}
        self._keep()
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
        taken = {device["client"] for device in self.devices.values()}
        if isinstance(wanted, int) and 0 <= wanted < self.clients and wanted not in taken:
            return wanted
        free = next((n for n in range(self.clients) if n not in taken), None)
        if free is None:
            raise InfeasibleError("enrolment", f"all {self.clients} places are taken", "")
        return free

    def _keep(self) -> None:
        if self.folder:
            try:
                Storage(self.folder).write(FILE, json.dumps(self.devices).encode())
            except StorageError as error:
                raise StorageError(self.folder, error.reason, "Free space") from error


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
