"""Real client processes over mutual TLS, granted by Venn, some killed and some on a bad network."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.edge.certificates import make_certificates
from actors.edge.config import EdgeDeviceConfig, SamplesConfig
from actors.edge.job import EdgeJobConfig
from actors.edge.server import EdgeServerConfig
from actors.edge.service import EdgeService, VennConfig
from actors.swan.engine import EngineConfig
from actors.venn.security import SecurityConfig
from jobs.bench.swan.lossy import lossy_relay
from raysys import machine, scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.config import config_to_dict
from raysys.federated.core.evaluation import evaluate
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import FederatedConfig, load_data, make_job, make_line
from raysys.federated.core.recipe import make_population as population_of
from raysys.federated.core.runner import run_rounds
from raysys.federated.swan.controller import ControllerConfig
from raysys.federated.swan.pilot import Policy
from raysys.federated.venn.scheduler_state import ServiceConfig

CODE = "bench"


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Sizes of a run."""

    devices: int
    rounds: int
    killed: int
    lossy: int
    deadline_s: float = 90.0


def edge_end_to_end(profile: Profile) -> Claim:
    """Accuracy of the devices' job less that of the in-process simulation, in points."""
    quick, full = Setting(4, 3, 1, 1), Setting(20, 12, 5, 5)
    setting = profile.pick(quick, full)
    recipe = recipe_of(setting)
    simulated = simulate(recipe, setting.rounds)
    with scratch.folder("swan") as folder:
        real = asyncio.run(run_devices(folder, recipe, setting))
    points = 100 * abs(real["accuracy"] - simulated)
    return Claim(
        name="edge_end_to_end",
        value=points,
        unit="points of accuracy from the in-process simulation",
        better="lower",
        baseline=Baseline(name="bound", value=0.5),
        samples={**real, "simulated_accuracy": simulated, **dataclasses.asdict(setting)},
        seeds=[recipe.seed],
    )


def recipe_of(setting: Setting) -> FederatedConfig:
    """Digits over as many clients as there are devices; every device takes part in every round."""
    return FederatedConfig(
        clients_per_round=setting.devices,
        partition=PartitionConfig(clients=setting.devices, alpha=1.0),
        local=LocalConfig(epochs=4, batch_size=10, lr=0.1),
    )


def simulate(recipe: FederatedConfig, rounds: int) -> float:
    """The same job by the federated core in this process."""
    data = load_data(recipe.data, recipe.seed, None)
    spec = recipe.model.spec(data)
    job = make_job(recipe, spec, population_of(recipe, data))
    run_rounds(job, data.samples(), rounds)
    return evaluate(spec, job.strategy.weights(0), data.test_samples()).accuracy


async def run_devices(folder: Path, recipe: FederatedConfig, setting: Setting) -> dict[str, Any]:
    """Service here, devices as processes; what came of it."""
    security, devices = _identities(folder, setting.devices)
    data = load_data(recipe.data, recipe.seed, None)
    spec = recipe.model.spec(data)
    line = make_line(recipe, spec)
    venn = VennConfig(
        folder=str(folder / "venn"),
        gateway_address="127.0.0.1:0",
        service=ServiceConfig(low_retry_s=0.3, high_retry_s=1.0),
    )
    service = EdgeService(
        venn, EdgeServerConfig(code=CODE, security=security), setting.devices, time.time()
    )
    started_s = time.monotonic()
    try:
        address = await service.start("127.0.0.1:0")
        assert service.server is not None
        gateway = service.server.config.gateways[0]
        config = EdgeJobConfig(
            job_id="digits",
            clients_per_round=setting.devices,
            deadline_s=setting.deadline_s,
            fraction=0.9,
        )
        job = service.add(config, line, recipe.seed, "127.0.0.1")
        fleet = _Fleet(folder, devices, address, gateway, recipe, setting)
        with fleet.running():
            chaos = asyncio.create_task(fleet.kill_some())
            await job.run(setting.rounds)
            chaos.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await chaos
    finally:
        await service.close()
    score = evaluate(spec, line.weights(0), data.test_samples())
    answers = [report.counts["ok"] for report in job.reports]
    return {
        "accuracy": score.accuracy,
        "seconds": time.monotonic() - started_s,
        "updates_per_round": answers,
        "repeated_rounds": job.repeats,
        "refused_answers": job.refused,
        "kills_by_stage": fleet.kills,
        "lossy_devices": fleet.lossy_devices,
        "resumed": fleet.count("resumed:"),
        "retries": fleet.count("retry:") + fleet.count("offline:"),
    }


def _identities(folder: Path, devices: int) -> tuple[SecurityConfig, list[SecurityConfig]]:
    """Mutual TLS and tokens: the service's side, and that of each device."""
    names = [f"device-{number}" for number in range(devices)]
    pem = make_certificates(folder / "pem", ["127.0.0.1"], names, days=1)
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(32))
    authority = str(pem / "authority.pem")
    server = SecurityConfig(
        certificate=str(pem / "server.pem"),
        key=str(pem / "server.key"),
        authority=authority,
        mutual=True,
        token_secret=str(secret),
    )
    clients = [
        SecurityConfig(
            certificate=str(pem / f"{name}.pem"),
            key=str(pem / f"{name}.key"),
            authority=authority,
        )
        for name in names
    ]
    return server, clients


class _Fleet:
    """Device processes: the last ``lossy`` behind bad networks, the first ``killed`` killed."""

    def __init__(
        self,
        folder: Path,
        identities: list[SecurityConfig],
        address: str,
        gateway: str,
        recipe: FederatedConfig,
        setting: Setting,
    ) -> None:
        self.kills: dict[str, int] = {}
        self.lossy_devices = setting.lossy
        self._folder, self._identities = folder, identities
        self._address, self._gateway = address, gateway
        self._recipe, self._setting = recipe, setting
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._rng = random.Random(0)
        self._ends: dict[int, tuple[str, str]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All devices up for the block."""
        with contextlib.ExitStack() as stack:
            first_lossy = self._setting.devices - self._setting.lossy
            for number in range(self._setting.devices):
                ends = (self._address, self._gateway)
                if number >= first_lossy:
                    ends = (
                        stack.enter_context(lossy_relay(self._address, 4.0, 0.05, number)),
                        stack.enter_context(lossy_relay(self._gateway, 4.0, 0.05, number + 100)),
                    )
                self._ends[number] = ends
                self._start(number)
            try:
                yield
            finally:
                for process in self._processes.values():
                    process.kill()
                for process in self._processes.values():
                    process.wait()

    async def kill_some(self) -> None:
        """SIGKILL each of the chosen devices once, in the middle of its work where we catch it."""
        for number in range(self._setting.killed):
            await asyncio.sleep(self._rng.uniform(0.5, 2.0))
            stage = await self._stage(number, wait_s=15.0)
            self._processes[number].kill()
            self._processes[number].wait()
            self.kills[stage] = self.kills.get(stage, 0) + 1
            self._start(number)

    def count(self, word: str) -> int:
        """Lines of all devices' output that start with a word."""
        logs = self._folder.glob("device-*.log")
        return sum(line.startswith(word) for log in logs for line in log.read_text().splitlines())

    async def _stage(self, number: int, wait_s: float) -> str:
        """Stage of the work in hand, waiting for there to be some."""
        path = self._folder / f"state-{number}" / "device.json"
        until_s = time.monotonic() + wait_s
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError, ValueError):
                work = json.loads(path.read_text()).get("work")
                if work:
                    return str(work["stage"])
            await asyncio.sleep(0.002)
        return "idle"

    def _start(self, number: int) -> None:
        path = self._folder / f"device-{number}.json"
        path.write_text(json.dumps(config_to_dict(self._config(number))))
        log = (self._folder / f"device-{number}.log").open("ab")
        command = [sys.executable, "-m", "jobs.device", "join", "--config", str(path)]
        command += ["--run-dir", str(self._folder / f"run-{number}-{time.monotonic_ns()}")]
        self._processes[number] = subprocess.Popen(
            command, cwd=machine.app_root(), stdout=log, stderr=log
        )
        log.close()

    def _config(self, number: int) -> EdgeDeviceConfig:
        server, gateway = self._ends[number]
        samples = SamplesConfig(client=number, split=self._recipe.partition)
        # Twenty devices share the host's cores: each would wait for the others for ever.
        policy = Policy(controller=ControllerConfig(pause_after_s=0.0))
        return EdgeDeviceConfig(
            server=server,
            code=CODE,
            state=str(self._folder / f"state-{number}"),
            gateways=(gateway,),
            most_wait_s=1.0,
            rest_s=0.5,
            timeout_s=5.0,
            retries=500,  # of the first enrolment, through a network that keeps breaking
            samples=samples,
            engine=EngineConfig(nice=0, policy=policy),
            security=self._identities[number],
        )
