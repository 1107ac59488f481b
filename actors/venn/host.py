"""Where the servers live: Ray actors, or plain processes that speak one JSON line when ready.

Both run the server's event loop in a thread of their own, started in the constructor, so that an
actor that Ray restarts serves again without anybody calling it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from actors.venn.gateway import GatewayServer
from actors.venn.scheduler import SchedulerServer
from actors.venn.security import SecurityConfig
from raysys.config import config_from_dict
from raysys.errors import ConfigError, RaysysError, RemoteError
from raysys.federated.venn.gateway_plan import GatewayConfig
from raysys.federated.venn.scheduler_state import ServiceConfig

START_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """One server.

    Args:
        kind: ``scheduler`` or ``gateway``.
        address: where it serves; ``host:0`` takes a free port.
        name: of a gateway; scheduler: address of the plan feed; folder: state of a scheduler.
        wait_ready: a standby (False) is ready when it has caught up with the log, everybody else
            when it serves.
    """

    kind: str = "gateway"
    address: str = "127.0.0.1:0"
    name: str = "gateway-0"
    scheduler: str = ""
    folder: str = ""
    wait_ready: bool = True
    service: ServiceConfig = field(default_factory=ServiceConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        if self.kind not in {"scheduler", "gateway"}:
            raise ConfigError("kind", self.kind, "'scheduler' or 'gateway'")


class Host:
    """A server on its own event loop and thread; the job applies ``ray.remote``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config_from_dict(HostConfig, config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(_make(self.config))
        self._started = asyncio.run_coroutine_threadsafe(self._start(), self._loop)

    async def _start(self) -> None:
        if isinstance(self._server, SchedulerServer):
            await self._server.run()
        else:
            await self._server.start(self.config.address)

    def ready(self) -> dict[str, Any]:
        """Block until the server serves (or, as a standby, follows); its health.

        Raises:
            RemoteError: it did not come up in time.
        """
        try:
            if isinstance(self._server, GatewayServer):
                self._started.result(START_TIMEOUT_S)
            else:
                wanted = self._server.leading if self.config.wait_ready else self._server.following
                self._call(asyncio.wait_for(wanted.wait(), START_TIMEOUT_S))
        except TimeoutError:
            raise RemoteError(self.config.name, f"not ready within {START_TIMEOUT_S:g} s") from None
        return self.health()

    def health(self) -> dict[str, Any]:
        """State of the server; raises what stopped it, if something did."""
        if self._started.done():
            self._started.result()
        state: dict[str, Any] = self._server.health()
        return state

    def close(self) -> None:
        """Stop the server and its loop; may be called twice."""
        if self._loop.is_running():
            self._started.cancel()
            self._call(self._server.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_TIMEOUT_S + 5)


async def _make(config: HostConfig) -> SchedulerServer | GatewayServer:
    if config.kind == "scheduler":
        return SchedulerServer(config.folder, config.address, config.service, config.security)
    interval_s = config.service.report_interval_s
    return GatewayServer(config.name, config.scheduler, config.gateway, config.security, interval_s)


def main(arguments: list[str], wait: Callable[[], Any]) -> int:
    """Run one server in this process until ``wait`` returns; prints its health when ready."""
    try:
        host = Host(json.loads(arguments[0]))
        print(json.dumps(host.ready()), flush=True)
        wait()
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    host.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], sys.stdin.read))
