"""Thousands of modelled devices in one process, against the same service as real ones.

They check in at Venn in batches, ask for plans, download (a model once per version), train for
real, and upload one by one. How long each takes, and what it costs, comes from the SoC model of its
phone on the cores that Swan, or the greedy baseline, would use.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from actors.edge.client import DownloadBrokenError, EdgeClient
from actors.edge.config import SamplesConfig
from actors.edge.device import TRANSIENT
from actors.edge.state import Work
from actors.edge.trainer import train_plan
from actors.venn.client import Assignments, DeviceClient
from actors.venn.security import SecurityConfig
from raysys.config import check, check_choice, check_range
from raysys.credentials import SECRET, revealed
from raysys.errors import RaysysError, RemoteError
from raysys.federated.core.training import Samples
from raysys.federated.swan.fleet import FleetDevice, draw_fleet
from raysys.federated.swan.plans import PlanLimits, pack_update, unpack_weights
from raysys.federated.swan.soc import BETAS, WORKLOADS
from raysys.federated.swan.willingness import backoff_s, home_of

DONE, FAILED = 0, 2
REST_S = 1.0  # a device leaves the round that it has just answered to others
MOST_REST_S = 60.0
TRIES = 6
Result = TypeVar("Result")
WORKLOAD_OF = {workload.name: workload for workload in WORKLOADS}


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateConfig:
    """A simulated fleet.

    Args:
        server: host:port of the edge plane. code: enrolment code,
            or ``file:PATH``.
        count: number of devices. duration_s: stop after so long; 0 for no such limit.
        updates: updates of the fleet after which it stops; 0 for no such limit.
        workload, beta: what the SoC model takes the training for. policy: "swan" or "greedy".
        unit_s: seconds of a one-prime-core step on the reference phone.
        time_scale: wall seconds per modelled second; 0 does not wait.
        samples: whose data the devices train on; device i takes client i modulo its clients.
    """

    server: str = "127.0.0.1:7710"
    code: str = field(default="", repr=False, metadata=SECRET)
    count: int = 1000
    duration_s: float = 30.0
    updates: int = 0
    workload: str = "MobileNetV2"
    beta: float = 1.0
    policy: str = "swan"
    unit_s: float = 1.0
    time_scale: float = 0.0
    seed: int = 0
    batch: int = 500
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    limits: PlanLimits = field(default_factory=PlanLimits)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        check(self, "server", ":" in self.server, "host:port")
        check_range(self, "count", 1, 1_000_000)
        check_range(self, "batch", 1, 100_000)
        check_choice(self, "workload", tuple(WORKLOAD_OF))
        check_choice(self, "policy", ("swan", "greedy"))
        check(self, "beta", self.beta in BETAS, f"one of {BETAS}")
        for name in ("duration_s", "updates", "time_scale"):
            check_range(self, name, 0)
        check(self, "updates", self.updates > 0 or self.duration_s > 0, "an end by time or updates")


@dataclass(slots=True)
class FleetReport:
    """What the fleet did."""

    devices: int = 0
    enrolled: int = 0
    checkins: int = 0
    leases: int = 0
    updates: int = 0
    accepted: int = 0
    failed: int = 0
    seconds: float = 0.0
    enrolled_s: float = 0.0
    modelled_s: float = 0.0
    modelled_j: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)


class SimulatedFleet:
    """The devices and their calls; ``run`` once."""

    def __init__(self, config: SimulateConfig) -> None:
        self.config = config
        self.report = FleetReport(devices=config.count)
        rng = np.random.default_rng(config.seed)
        self._ids = [rng.bytes(16) for _ in range(config.count)]
        workload = WORKLOAD_OF[config.workload]
        self.devices: list[FleetDevice] = draw_fleet(
            config.count, workload, config.beta, config.policy, config.unit_s, config.seed
        )
        self._samples: dict[int, Samples] = {}
        self._models: dict[bytes, bytes] = {}
        self._tokens: dict[int, str] = {}
        self._gateways: list[str] = []
        self._attributes: list[str] = []
        self._mean_ms = 0.0
        self._schema = 1
        self._rng = rng
        self._pace_s = REST_S
        self._in_vain = np.zeros(config.count, dtype=np.int64)
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(64)
        self._trainer = ThreadPoolExecutor(1, "simulated-train", torch.set_num_threads, (1,))

    async def run(self) -> FleetReport:
        """Enrol all, then check in until the end.

        Raises:
            RemoteError: the server cannot be reached or refuses the first device.
        """
        try:
            return await self._run(time.monotonic())
        finally:
            self._trainer.shutdown(wait=False, cancel_futures=True)

    async def _run(self, started_s: float) -> FleetReport:
        async with self._client(0) as client:
            await self._enrol(client, 0)
            await asyncio.gather(*(self._enrol(client, i) for i in range(1, self.config.count)))
        if not self._gateways:
            reason = "UNAVAILABLE: it names no gateway"
            raise RemoteError(self.config.server, reason, "Give the service's venn.gateways")
        self.report.enrolled = len(self._tokens)
        self.report.enrolled_s = time.monotonic() - started_s
        ready = np.zeros(self.config.count)
        homes = np.array([home_of(device, len(self._gateways)) for device in self._ids])
        async with contextlib.AsyncExitStack() as stack:
            gateways = [
                await stack.enter_async_context(self._gateway(address))
                for address in self._gateways
            ]
            while not self._over(started_s):
                idle = True
                for number, gateway in enumerate(gateways):
                    now_s = time.monotonic()
                    due = np.flatnonzero((ready <= now_s) & (homes == number))[: self.config.batch]
                    if len(due):
                        idle = False
                        await self._check_in(gateway, due, ready)
                if idle:
                    await asyncio.sleep(0.02)
            if self._tasks:
                await asyncio.gather(*self._tasks)
        self.report.seconds = time.monotonic() - started_s
        return self.report

    def _over(self, started_s: float) -> bool:
        if self.config.updates and self.report.updates >= self.config.updates:
            return True
        return 0 < self.config.duration_s <= time.monotonic() - started_s

    async def _enrol(self, client: EdgeClient, device: int) -> None:
        async with self._slots:
            sample_ms = 1000.0 * self.devices[device].step_s
            text = f'{{"client": {device}, "sample_ms": {sample_ms:.3f}}}'
            code = revealed(self.config.code, "code")
            ticket = await client.enrol_as(self._ids[device], code, text)
        self._tokens[device] = ticket.token
        self._gateways = list(ticket.gateways)
        self._attributes, self._schema = list(ticket.attributes), ticket.schema_version
        self._mean_ms = ticket.mean_sample_ms

    async def _check_in(
        self, gateway: DeviceClient, due: np.ndarray[Any, Any], ready: np.ndarray[Any, Any]
    ) -> None:
        columns = [self._column(name, due) for name in self._attributes]
        times = np.array([1000.0 * self.devices[i].step_s for i in due])
        speed = (times / (self._mean_ms or float(times.mean())), np.ones(len(due)))
        ids = b"".join(self._ids[i] for i in due)
        try:
            offers = await gateway.check_in(ids, columns, 0, speed)
        except RaysysError as error:
            self._count_error(error)
            await asyncio.sleep(0.5)
            return
        self.report.checkins += len(due)
        now_s = time.monotonic()
        ready[due] = now_s + np.maximum(offers.retry_after_s, 0.05)
        idle = offers.slots < 0
        if idle.any():
            self._pace_s = float(np.median(offers.retry_after_s[idle]))
        for place in np.flatnonzero(~idle):
            device = int(due[place])
            ready[device] = np.inf
            work = self._work(offers, int(place), gateway.address)
            task = asyncio.create_task(self._errand(gateway, device, work, ready))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(0)

    async def _errand(
        self, gateway: DeviceClient, device: int, work: Work, ready: np.ndarray[Any, Any]
    ) -> None:
        self.report.leases += 1
        outcome = FAILED
        async with self._slots:
            try:
                outcome = DONE if await self._train(device, work) else FAILED
            except RaysysError as error:
                self._count_error(error)
            try:
                await gateway.release(work.epoch, [work.counter], [outcome])
            except RaysysError as error:
                self._count_error(error)
        self.report.failed += outcome == FAILED
        ready[device] = time.monotonic() + self._rest_s(device, outcome)

    def _rest_s(self, device: int, outcome: int) -> float:
        """As long as the service lets devices wait; longer after each lease that was in vain."""
        if outcome == DONE:
            self._in_vain[device] = 0
            return max(REST_S, self._pace_s)
        self._in_vain[device] += 1
        return backoff_s(int(self._in_vain[device]), self._rng.random(), REST_S, MOST_REST_S)

    async def _train(self, device: int, work: Work) -> bool:
        async with self._client(device, work.endpoint) as client:
            planned = await _patiently(lambda: client.plan(work, self.config.limits))
            work.model_bytes, work.nonce = planned.model_bytes, planned.nonce.hex()
            work.model_sha256 = planned.model_sha256.hex()
            content = self._models.get(planned.model_sha256)
            if content is None:
                content = await _patiently(lambda: _download(client, work))
                self._models = {planned.model_sha256: content}
            weights = unpack_weights(content, planned.plan.spec, work.endpoint)
            # In a thread: whoever shares this event loop, such as a gateway, must not fall silent.
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(
                self._trainer, lambda: train_plan(planned.plan, weights, self._data(device))
            )
            seconds = result.facts["steps"] * self.devices[device].step_s
            self.report.modelled_s += seconds
            joules = self.devices[device].step_j
            self.report.modelled_j += result.facts["steps"] * joules
            if self.config.time_scale:
                await asyncio.sleep(self.config.time_scale * seconds)
            told = {"seconds_per_step": self.devices[device].step_s, "joules": joules}
            update = pack_update(result.delta, {**result.facts, **told})
            receipt = await _patiently(lambda: client.upload(work, update))
        self.report.updates += 1
        self.report.accepted += bool(receipt.accepted)
        return bool(receipt.accepted)

    def _data(self, device: int) -> Samples:
        settings = self.config.samples
        client = device % settings.split.clients
        if client not in self._samples:
            self._samples[client] = dataclasses.replace(settings, client=client).load()
        return self._samples[client]

    def _work(self, offers: Assignments, place: int, address: str) -> Work:
        task = offers.tasks[int(offers.slots[place])]
        return Work(
            gateway_address=address,
            gateway=offers.gateway,
            epoch=offers.epoch,
            counter=int(offers.leases[place]),
            job_id=task.job_id,
            round=task.round,
            endpoint=task.plan_uri.removeprefix("edge://"),
            upload=task.upload_endpoint,
            expires_s=time.time() + float(offers.expiry_s[place]),
            ticket=offers.ticket(place).hex(),
        )

    def _column(self, name: str, due: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        def value(device: FleetDevice) -> float:
            if name == "cpu":
                return device.cpu_score
            return 1000.0 * device.phone.ram_gb if name == "mem" else 12.0

        return np.array([value(self.devices[i]) for i in due], dtype=np.float32)

    def _client(self, device: int, address: str = "") -> EdgeClient:
        security = dataclasses.replace(self.config.security, token=self._tokens.get(device, ""))
        return EdgeClient(address or self.config.server, self._ids[device], security)

    def _gateway(self, address: str) -> DeviceClient:
        security = dataclasses.replace(self.config.security, token=self._tokens[0])
        return DeviceClient(address, security, self._schema)

    def _count_error(self, error: RaysysError) -> None:
        text = str(error)[:120]
        self.report.errors[text] = self.report.errors.get(text, 0) + 1


async def _patiently(ask: Callable[[], Awaitable[Result]]) -> Result:
    """Try again after failures that pass, as a real device does."""
    for failures in range(1, TRIES):
        try:
            return await ask()
        except RemoteError as error:
            if not error.reason.startswith(TRANSIENT):
                raise
        await asyncio.sleep(backoff_s(failures, random.random(), most_s=10.0))
    return await ask()


async def _download(client: EdgeClient, work: Work) -> bytes:
    """A model, from its beginning."""
    try:
        return await client.download(work, b"")
    except DownloadBrokenError as broken:
        raise broken.cause from broken
