"""Settings that tests of the edge plane and of its devices share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.edge.certificates import make_certificates
from actors.edge.config import EdgeDeviceConfig, SamplesConfig
from actors.edge.service import VennConfig
from actors.swan.engine import EngineConfig
from actors.venn.security import SecurityConfig
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec, initial_weights
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import (
    FederatedConfig,
)
from raysys.federated.swan.pilot import Policy
from raysys.federated.swan.plans import Plan, pack_weights
from raysys.federated.venn.scheduler_state import ServiceConfig

CLIENTS = 3
RECIPE = FederatedConfig(
    clients_per_round=CLIENTS,
    partition=PartitionConfig(clients=CLIENTS, scheme="iid"),
    local=LocalConfig(epochs=1, batch_size=32, lr=0.1),
)
QUIET = EngineConfig(nice=0, sample_s=5.0, policy=Policy(kind="fixed"))


def device_config(folder: Path, number: int, server: str, **more: Any) -> EdgeDeviceConfig:
    samples = SamplesConfig(client=number, split=RECIPE.partition)
    values: dict[str, Any] = {
        "server": server, "code": "c", "state": str(folder / f"device-{number}"),
        "most_wait_s": 0.1, "rest_s": 0.05, "timeout_s": 5.0, "samples": samples, "engine": QUIET,
        "attributes": {"cpu": 5.0, "mem": 1000.0, "os": 12.0},
    }  # fmt: skip
    return EdgeDeviceConfig(**{**values, **more})


def venn_config(folder: Path) -> VennConfig:
    return VennConfig(
        folder=str(folder / "venn"),
        gateway_address="127.0.0.1:0",
        service=ServiceConfig(low_retry_s=0.05, high_retry_s=0.1, report_interval_s=0.05),
    )


def identities(folder: Path) -> tuple[SecurityConfig, SecurityConfig]:
    """Mutual TLS and tokens, for the service and for a device."""
    pem = make_certificates(folder / "pem", ["127.0.0.1"], ["device"], days=1)
    (folder / "secret").write_text("s" * 40)
    authority = str(pem / "authority.pem")
    service = SecurityConfig(
        certificate=str(pem / "server.pem"), key=str(pem / "server.key"), authority=authority,
        mutual=True, token_secret=str(folder / "secret"),
    )  # fmt: skip
    device = SecurityConfig(
        certificate=str(pem / "device.pem"), key=str(pem / "device.key"), authority=authority
    )
    return service, device


PLAN = Plan(spec=ModelSpec(architecture=Mlp(sizes=(64, 10))), local=LocalConfig(), client=0)
MODEL = pack_weights(initial_weights(PLAN.spec, 0).values)
