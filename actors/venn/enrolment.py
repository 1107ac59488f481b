"""How devices reach a job: a fleet that checks a population in, and the job's door.

A device with a task goes to the ``upload_endpoint`` of its offer, ``host:port/secret``; the secret
is known only to devices that got a task. One line of JSON per device.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.venn.client import DeviceClient
from actors.venn.load import ATOM_SHARES, ATOM_VALUES
from actors.venn.security import (
    SecurityConfig,
    calling_context,
    check_address,
    listening_context,
)
from raysys.errors import ConfigError, RemoteError
from raysys.federated.core.population import Population
from raysys.federated.venn.gateway import FAILED

Ints = npt.NDArray[np.int64]
_LINE_BYTES = 4096
_KEPT_ARRIVALS = 1_000_000
_DOOR_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A device that was sent to a job: its id in hex, and the lease it holds at a gateway."""

    device: str
    gateway: str
    epoch: int
    lease: int


def device_id(population: str, client: int) -> bytes:
    """The 16 bytes that stand for a client of a named population."""
    return hashlib.blake2b(population.encode(), digest_size=8).digest() + client.to_bytes(8, "big")


def client_of(population: str, device: str) -> int:
    """The client behind a device id in hex; -1 for a device of another population."""
    raw = bytes.fromhex(device)
    client = int.from_bytes(raw[8:], "big")
    return client if raw == device_id(population, client) else -1


class Fleet:
    """The clients of a population as devices, and the door of one job.

    Args:
        gateways: every device always goes to the same one.
        name: of the population; the same name gives the same devices with the same attributes.
    """

    def __init__(
        self,
        gateways: Sequence[str],
        name: str,
        population: Population,
        security: SecurityConfig | None = None,
    ) -> None:
        self.refused = 0
        self._security = security or SecurityConfig()
        self._calling = calling_context(self._security)
        self._name = name
        self._clients = {address: DeviceClient(address, security) for address in gateways}
        self._addresses = list(gateways)
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        draw = np.random.default_rng(int.from_bytes(digest, "big"))
        kinds = draw.choice(len(ATOM_VALUES), population.n_clients, p=ATOM_SHARES)
        self._values = np.asarray(ATOM_VALUES, dtype=np.float32)[kinds]
        self._speed = _speed(population)
        self._arrivals: list[Enrolment] = []
        self._server: asyncio.Server | None = None
        self._secret = secrets.token_hex(16)
        self.endpoint = ""

    async def start(self, host: str) -> str:
        """Open the door; returns its endpoint.

        Raises:
            ConfigError: plain text beyond loopback that nobody asked for.
        """
        context = listening_context(self._security)
        check_address(f"{host}:0", self._security, context is not None)
        self._server = await asyncio.start_server(
            self._receive, host, 0, limit=_LINE_BYTES, ssl=context
        )
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"{host}:{port}/{self._secret}"
        return self.endpoint

    async def close(self) -> None:
        """Close the door and the channels; may be called twice."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        for client in self._clients.values():
            await client.close()

    def arrived(self) -> list[Enrolment]:
        """Devices that came since the last call."""
        found, self._arrivals = self._arrivals, []
        return found

    async def check_in(self, clients: Ints) -> None:
        """Check these clients in, and send those that get a task to the job that it names.

        A gateway that does not answer is passed over: its devices try again another time.
        """
        for index, address in enumerate(self._addresses):
            mine = clients[clients % len(self._addresses) == index]
            if not len(mine):
                continue
            identities = b"".join(device_id(self._name, client) for client in mine.tolist())
            columns = list(self._values[mine].T)
            speed = None if self._speed is None else (self._speed[0][mine], self._speed[1][mine])
            try:
                answer = await self._clients[address].check_in(identities, columns, speed=speed)
            except RemoteError:
                self.refused += 1
                continue
            sent: dict[str, list[Enrolment]] = defaultdict(list)
            for place in np.flatnonzero(answer.slots >= 0).tolist():
                task = answer.tasks[int(answer.slots[place])]
                device = identities[16 * place : 16 * place + 16].hex()
                lease = int(answer.leases[place])
                enrolment = Enrolment(device, address, int(answer.epoch), lease)
                sent[task.upload_endpoint].append(enrolment)
            for endpoint, devices in sent.items():
                await self._send(endpoint, devices)

    async def release(self, devices: Sequence[Enrolment], outcome: int) -> None:
        """End leases; one that cannot be released any more ends by itself."""
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for item in devices:
            groups[item.gateway, item.epoch].append(item.lease)
        for (address, epoch), leases in groups.items():
            if address in self._clients:
                with contextlib.suppress(RemoteError):
                    await self._clients[address].release(epoch, leases, [outcome] * len(leases))

    async def _send(self, endpoint: str, devices: list[Enrolment]) -> None:
        """Bring devices to a job's door; without one their leases are given back."""
        if endpoint == self.endpoint:
            self._arrivals += devices
            return
        place, _, secret = endpoint.partition("/")
        host, _, port = place.rpartition(":")
        try:
            check_address(place, self._security, self._calling is not None)
            async with asyncio.timeout(_DOOR_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, int(port), ssl=self._calling)
                lines = [secret, *(json.dumps(asdict(item)) for item in devices)]
                writer.write("".join(f"{line}\n" for line in lines).encode())
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, ValueError, TimeoutError, ConfigError) as error:
            _log.warning("%d devices given back: job door %s: %s", len(devices), place, error)
            await self.release(devices, FAILED)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One visit at the door: the secret, then a line per device; anything else ends it."""
        try:
            async with asyncio.timeout(_DOOR_TIMEOUT_S):
                secret = (await reader.readline()).strip()
                if not secrets.compare_digest(secret, self._secret.encode()):
                    return
                while line := await reader.readline():
                    if len(self._arrivals) < _KEPT_ARRIVALS:
                        self._arrivals.append(_enrolment(line))
        except (ValueError, TypeError, OSError, TimeoutError):
            pass  # a visitor that speaks something else learns nothing
        finally:
            writer.close()


def _enrolment(line: bytes) -> Enrolment:
    item: dict[str, Any] = json.loads(line)
    found = Enrolment(**item)
    if len(bytes.fromhex(found.device)) != 16 or not isinstance(found.gateway, str):
        raise ValueError(found.device)
    return Enrolment(found.device, found.gateway, int(found.epoch), int(found.lease))


def _speed(population: Population) -> tuple[Any, Any] | None:
    """Compute time and bandwidth over the population's means, where it has device columns."""
    rates, links = population.rate_mac_s, population.bandwidth_bytes_s
    if rates is None or links is None:
        return None
    return rates.mean() / rates, links / links.mean()
