"""The service as Ray actors: leader, warm standby and gateways, restarted by Ray when they die."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.session import Session
from actors.venn.host import Host
from actors.venn.processes import free_port
from actors.venn.security import SecurityConfig
from raysys.config import check, check_range, config_to_dict
from raysys.federated.venn.gateway_plan import GatewayConfig
from raysys.federated.venn.scheduler_state import ServiceConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """A deployment on one host (leader and standby share a folder and an address).

    Args:
        host: address that everything binds to.
        scheduler_port, gateway_port: first port of each; 0 takes free ones.
        gateways: number of gateways.
        standby: keep a warm standby scheduler.
    """

    host: str = "127.0.0.1"
    scheduler_port: int = 0
    gateway_port: int = 0
    gateways: int = 2
    standby: bool = True
    service: ServiceConfig = field(default_factory=ServiceConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        check_range(self, "scheduler_port", 0, 65535)
        check_range(self, "gateway_port", 0, 65535)
        check_range(self, "gateways", 1, 1000)
        same = self.gateway.fence_s == self.service.fence_s
        check(self, "gateway", same, "the fence_s of the service section", "Set both alike")


@dataclass(eq=False)
class VennCluster:
    """A running deployment; ``close`` may be called twice."""

    scheduler_address: str
    gateway_addresses: list[str]
    actors: dict[str, Any]

    @classmethod
    def start(cls, session: Session, folder: Path, config: ClusterConfig) -> VennCluster:
        """Start the actors and wait until all serve.

        Raises:
            RemoteError: a server did not come up.
        """
        import ray

        remote = ray.remote(Host)
        scheduler = f"{config.host}:{config.scheduler_port or free_port()}"
        shared = {
            "service": config_to_dict(config.service),
            "gateway": config_to_dict(config.gateway),
            "security": config_to_dict(config.security),
        }
        base = {**shared, "kind": "scheduler", "folder": str(folder), "address": scheduler}
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_concurrency": 4,
            "namespace": session.namespace,
        }
        actors: dict[str, Any] = {}
        names = ["scheduler-a", *(["scheduler-b"] if config.standby else [])]
        for name in names:
            settings = {**base, "name": name, "wait_ready": name == names[0]}
            actors[name] = remote.options(**options, name=f"raysys/venn/{name}").remote(settings)
            ray.get(actors[name].ready.remote())
        addresses = []
        for index in range(config.gateways):
            port = config.gateway_port + index if config.gateway_port else free_port()
            addresses.append(f"{config.host}:{port}")
            name = f"gateway-{index}"
            settings = {
                **shared,
                "kind": "gateway",
                "name": name,
                "scheduler": scheduler,
                "address": addresses[-1],
            }
            actors[name] = remote.options(**options, name=f"raysys/venn/{name}").remote(settings)
        ray.get([actors[f"gateway-{index}"].ready.remote() for index in range(config.gateways)])
        return cls(scheduler, addresses, actors)

    def health(self) -> dict[str, dict[str, Any]]:
        """Health of every actor by name."""
        import ray

        names = list(self.actors)
        return dict(zip(names, ray.get([self.actors[name].health.remote() for name in names])))

    def close(self) -> None:
        """Stop the servers and remove the actors."""
        import ray

        actors, self.actors = self.actors, {}
        for actor in reversed(list(actors.values())):
            ray.get(actor.close.remote())
            ray.kill(actor)
