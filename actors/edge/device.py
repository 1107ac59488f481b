"""What all parts of a device share: its settings, memory, clock, log, and how it calls servers."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from actors.edge.client import EdgeClient
from actors.edge.config import EdgeDeviceConfig
from actors.edge.state import DeviceState, StateFolder, Work
from actors.venn.client import DeviceClient
from actors.venn.security import SecurityConfig
from raysys.errors import RaysysError, RemoteError
from raysys.federated.swan.plans import PlanRefusedError
from raysys.federated.swan.willingness import backoff_s

TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN", "ABORTED")
EVENTS = 500
Result = TypeVar("Result")


class LeaseLostError(RaysysError):
    """The lease of the work in hand has ended; the work is dropped."""


class Device:
    """Settings and memory of one device.

    Args:
        on_event: called with a dictionary for everything worth telling.
        clock: wall-clock seconds.
    """

    def __init__(
        self,
        config: EdgeDeviceConfig,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.folder = StateFolder(Path(config.state))
        self.state: DeviceState = self.folder.load()
        self.events: list[dict[str, Any]] = []
        self.stopped = threading.Event()
        self.clock, self._on_event = clock, on_event

    def save(self) -> None:
        """Write the memory to disk."""
        self.folder.save(self.state)

    def note(self, kind: str, text: str) -> None:
        """Tell something."""
        event = {"kind": kind, "text": text, "at_s": self.clock()}
        self.events = [*self.events[1 - EVENTS :], event]
        if self._on_event is not None:
            self._on_event(event)

    def edge(self, address: str, with_token: bool = True) -> EdgeClient:
        """A client of an edge plane."""
        security = self.identity() if with_token else self.config.security
        device = bytes.fromhex(self.state.device_id)
        return EdgeClient(address, device, security, self.config.timeout_s)

    def gateway(self, address: str) -> Any:
        """A client of a Venn gateway."""
        return DeviceClient(address, self.identity(), self.state.schema_version)

    def identity(self) -> SecurityConfig:
        """Certificates and the token of the enrolment."""
        return dataclasses.replace(self.config.security, token=self.state.token)

    async def patiently(
        self,
        what: str,
        ask: Callable[[], Awaitable[Result]],
        work: Work | None,
        *,
        endless: bool = False,
    ) -> Result:
        """Try again after transient failures, for as long as the lease lives.

        Args:
            endless: there is no number of failures that is too many; only a stop ends it.

        Raises:
            RemoteError: a failure that will not pass, or too many. LeaseLostError: out of time.
        """
        failures = 0
        while True:
            try:
                return await ask()
            except PlanRefusedError:
                raise
            except RemoteError as error:
                failures += 1
                transient = error.reason.startswith(TRANSIENT)
                spent = failures >= self.config.retries and not endless
                if not transient or spent or self.stopped.is_set():
                    raise
                if work is not None and self.clock() > work.expires_s:
                    raise LeaseLostError(f"{what}: the lease of job {work.job_id} has ended") from (
                        error
                    )
                self.note("retry", f"{what}: {error.reason[:120]}")
                await self.sleep(backoff_s(failures, random.random(), most_s=10.0))

    async def sleep(self, seconds: float) -> None:
        """Wait, but notice a stop within a quarter of a second."""
        until_s = time.monotonic() + seconds
        while not self.stopped.is_set():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, 0.25))
