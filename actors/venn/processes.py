"""A deployment on one machine as plain processes, each of which can be killed and comes back.

Scheduler leader, warm standby and gateways. ``supervise`` restarts what died; a supervisor process
of any other kind (systemd, Kubernetes) may take its place, since a server needs only its JSON line.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys import machine
from raysys.config import config_to_dict
from raysys.errors import RemoteError
from raysys.federated.venn.gateway_plan import GatewayConfig
from raysys.federated.venn.scheduler_state import ServiceConfig

_STOP_TIMEOUT_S = 10.0


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(eq=False, slots=True)
class ServerProcess:
    """One server process and how to start it again."""

    config: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start without waiting."""
        command = [sys.executable, "-m", "actors.venn.host", json.dumps(self.config)]
        self.process = subprocess.Popen(
            command, cwd=machine.app_root(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ready(self) -> dict[str, Any]:
        """Wait for the line that says it serves.

        Raises:
            RemoteError: the process ended instead.
        """
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RemoteError(self.config["name"], f"it ended with code {code}", "See its output")
        return dict(json.loads(line))

    def kill(self) -> None:
        """SIGKILL, as a crash or the OOM killer would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._close_pipes()

    def stop(self) -> None:
        """End in good order; kills after ten seconds. May be called twice."""
        if self.process is None or self.process.poll() is not None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close_pipes()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _close_pipes(self) -> None:
        assert self.process is not None
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(eq=False, slots=True)
class ProcessDeployment:
    """Two schedulers and some gateways; addresses stay the same over restarts."""

    schedulers: list[ServerProcess]
    gateways: list[ServerProcess]
    scheduler_address: str
    gateway_addresses: list[str] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        folder: Path,
        gateways: int = 1,
        service: ServiceConfig | None = None,
        gateway: GatewayConfig | None = None,
        standby: bool = True,
    ) -> ProcessDeployment:
        """Start everything and wait until it serves.

        Raises:
            RemoteError: a server did not come up.
        """
        scheduler_address = f"127.0.0.1:{free_port()}"
        shared = {"service": config_to_dict(service or ServiceConfig())}
        base = {**shared, "kind": "scheduler", "folder": str(folder), "address": scheduler_address}
        leader = ServerProcess({**base, "name": "scheduler-a"})
        leader.start()
        leader.ready()
        schedulers = [leader]
        if standby:
            schedulers.append(ServerProcess({**base, "name": "scheduler-b", "wait_ready": False}))
            schedulers[1].start()
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(gateways)]
        servers = [
            ServerProcess(
                {
                    **shared,
                    "kind": "gateway",
                    "name": f"gateway-{index}",
                    "scheduler": scheduler_address,
                    "address": address,
                    "gateway": config_to_dict(gateway or GatewayConfig()),
                }
            )
            for index, address in enumerate(addresses)
        ]
        for server in servers:
            server.start()
        for server in (*servers, *schedulers[1:]):
            server.ready()
        return cls(schedulers, servers, scheduler_address, addresses)

    def supervise(self) -> int:
        """Restart what died; how many processes that were. A returning scheduler is a standby."""
        dead = [server for server in (*self.schedulers, *self.gateways) if not server.alive]
        for server in dead:
            if server.config["kind"] == "scheduler":
                server.config["wait_ready"] = False
            server.start()
        return len(dead)

    def stop(self) -> None:
        """Stop everything; may be called twice."""
        for server in (*self.gateways, *reversed(self.schedulers)):
            server.stop()


@contextlib.contextmanager
def deployment(folder: Path, **options: Any) -> Iterator[ProcessDeployment]:
    """A deployment for the duration of a block."""
    running = ProcessDeployment.start(folder, **options)
    try:
        yield running
    finally:
        running.stop()
