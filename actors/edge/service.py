"""An edge plane with its jobs, and, where none runs yet, a small Venn of its own.

Plain asyncio, no Ray: the same service runs under a job, in a test, or beside devices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from actors.edge.job import EdgeJob, EdgeJobConfig
from actors.edge.server import EdgeServer, EdgeServerConfig
from actors.venn.client import JobClient
from actors.venn.gateway import GatewayServer
from actors.venn.scheduler import SchedulerServer
from actors.venn.security import SecurityConfig, TokenAuthority
from raysys.federated.core.strategy import Strategy
from raysys.federated.venn.scheduler_state import ServiceConfig

TOKEN_LIFE_S = 7 * 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VennConfig:
    """Where Venn is.

    Args:
        scheduler: host:port of its job plane; empty starts one here.
        gateways: its gateways, told to devices; for one that is started here leave it empty.
        folder: state of a scheduler that is started here.
        gateway_address: where a gateway that is started here listens.
    """

    scheduler: str = ""
    gateways: tuple[str, ...] = ()
    folder: str = "runs/edge-venn"
    gateway_address: str = "127.0.0.1:7701"
    service: ServiceConfig = dataclasses.field(
        default_factory=lambda: ServiceConfig(low_retry_s=1.0, high_retry_s=60.0)
    )


class EdgeService:
    """Starts and stops the parts in order; ``close`` may be called twice.

    Args:
        clients: client numbers that devices can hold.
        now_s: wall-clock seconds, for tokens of its own parts.
    """

    def __init__(self, venn: VennConfig, server: EdgeServerConfig, clients: int, now_s: float):
        self.venn, self.config, self.clients = venn, server, clients
        self.scheduler = venn.scheduler
        self.server: EdgeServer | None = None
        self._now_s = now_s
        self._own: list[SchedulerServer | GatewayServer] = []
        self._planes: list[JobClient] = []

    async def start(self, address: str = "127.0.0.1:7710") -> str:
        """Serve; returns host:port of the edge plane.

        Raises:
            RemoteError: a part did not come up. StorageError: a certificate cannot be read.
        """
        gateways = list(self.venn.gateways)
        if not self.scheduler:
            gateways.append(await self._start_venn())
        config = dataclasses.replace(self.config, gateways=tuple(gateways))
        self.server = EdgeServer(config, self.clients)
        port = await self.server.start(address)
        return f"{address.rpartition(':')[0]}:{port}"

    def add(self, config: EdgeJobConfig, strategy: Strategy, seed: int, host: str) -> EdgeJob:
        """A job that is served from here; its ``run`` drives it."""
        assert self.server is not None
        plane = JobClient(self.scheduler, config.job_id, self._security("job"))
        self._planes.append(plane)
        job = EdgeJob(config, strategy, self.clients, seed, plane)
        self.server.add(job, host)
        return job

    async def close(self) -> None:
        """Stop in reverse order."""
        planes, self._planes = self._planes, []
        for plane in planes:
            await plane.close()
        if self.server is not None:
            await self.server.close()
        own, self._own = self._own, []
        for part in reversed(own):
            await part.close()

    async def _start_venn(self) -> str:
        host, _, port = self.venn.gateway_address.rpartition(":")
        scheduler = SchedulerServer(
            self.venn.folder, f"{host}:0", self.venn.service, self._security("job")
        )
        self._own.append(scheduler)
        self.scheduler = f"{host}:{await scheduler.start()}"
        gateway = GatewayServer("edge-0", self.scheduler, security=self._security("gateway"))
        self._own.append(gateway)
        return f"{host}:{await gateway.start(f'{host}:{port}')}"

    def _security(self, role: str) -> SecurityConfig:
        """The service's own security with a token for a role, where tokens are asked for."""
        security = self.config.security
        if not security.token_secret:
            return security
        authority = TokenAuthority(Path(security.token_secret).read_bytes().strip())
        token = authority.issue("edge-service", role, self._now_s, TOKEN_LIFE_S)
        return dataclasses.replace(security, token=token)
