"""What a device is told by its owner."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from actors.swan.engine import EngineConfig
from actors.venn.security import SecurityConfig
from raysys.config import check, check_choice, check_range
from raysys.credentials import SECRET
from raysys.errors import ConfigError
from raysys.federated.core.datasets import FederatedData, as_samples, load_digits_data
from raysys.federated.core.own_data import load_npz_data
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.training import Samples
from raysys.federated.swan.plans import PlanLimits
from raysys.federated.swan.willingness import WillingnessConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """The samples that this device trains on; they never leave it.

    Args:
        kind: "digits" takes one client's part of the packaged digits (to try things out), "npz"
            the arrays ``inputs`` and ``targets`` of a file of the device's own.
        client: which part. seed, split: how digits are dealt; equal on all devices.
    """

    kind: str = "digits"
    path: str = ""
    client: int = 0
    seed: int = 0
    split: PartitionConfig = field(default_factory=lambda: PartitionConfig(clients=20))

    def __post_init__(self) -> None:
        check_choice(self, "kind", ("digits", "npz"))
        check(self, "path", (self.kind == "npz") == bool(self.path), "a path for npz only")
        check_range(self, "client", 0)

    def load(self) -> Samples:
        """Read the samples.

        Raises:
            ConfigError: no such client. CapabilityError, DataError: the file is missing or bad.
        """
        if self.kind == "npz":
            return load_npz_data(Path(self.path), self.seed).samples()
        data = load_digits_data(self.seed, image=True)
        return part_of(data, self.split, self.seed, self.client)


def part_of(data: FederatedData, split: PartitionConfig, seed: int, client: int) -> Samples:
    """One client's samples of a data set that is dealt to many.

    Raises:
        ConfigError: no such client, or one without samples.
    """
    population = partition(data.targets, split, seed, data.keys)
    if client >= population.n_clients:
        raise ConfigError("samples.client", client, f"0 to {population.n_clients - 1}")
    rows = population.samples(client)
    if not len(rows):
        raise ConfigError("samples.client", client, "a client with samples")
    return as_samples(data.inputs[rows], data.targets[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeDeviceConfig:
    """One device.

    Args:
        server: host:port of the edge plane, for enrolment.
        code: enrolment code, or ``file:PATH``. state: folder of this device alone.
        gateways: Venn gateways to use instead of those that the server names.
        attributes: values of the columns of a check-in that are not measured (``cpu`` is).
        hosts: hosts that may serve plans and take updates; the server's own always may.
        rounds: stop after so many updates; 0 goes on for ever.
        most_wait_s: longest pause between check-ins, whatever the service asks for.
        rest_s: pause after a finished task, so that a device does not take a round's next lease.
        idle_s: wait while unwilling. timeout_s: of a call. retries: of a stage, while its lease
            lives. decline_s: how long a job is shunned whose answer was refused.
    """

    server: str = "127.0.0.1:7710"
    code: str = field(default="", repr=False, metadata=SECRET)
    state: str = "runs/device"
    gateways: tuple[str, ...] = ()
    attributes: dict[str, float] = field(default_factory=lambda: {"mem": 4000.0, "os": 12.0})
    hosts: tuple[str, ...] = ()
    rounds: int = 0
    most_wait_s: float = 900.0
    rest_s: float = 1.0
    idle_s: float = 60.0
    timeout_s: float = 10.0
    retries: int = 20
    decline_s: float = 600.0
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    willingness: WillingnessConfig = field(default_factory=WillingnessConfig)
    limits: PlanLimits = field(default_factory=PlanLimits)
    engine: EngineConfig = field(default_factory=EngineConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        check(self, "server", ":" in self.server, "host:port")
        for name in ("most_wait_s", "idle_s", "timeout_s", "decline_s"):
            check_range(self, name, 0, low_open=True)
        check_range(self, "rounds", 0)
        check_range(self, "rest_s", 0)
        check_range(self, "retries", 1)

    def may_call(self, endpoint: str) -> bool:
        """Whether plans and updates may go to an endpoint that the service named."""
        host = endpoint.rpartition(":")[0]
        return bool(host) and host in {self.server.rpartition(":")[0], *self.hosts}
