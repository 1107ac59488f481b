"""The device: enrols, checks in, trains what it is granted under Swan, and sends the update.

Whatever a server answers, the device refuses it, reports, and stays alive.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from actors.edge.config import EdgeDeviceConfig
from actors.edge.device import Device
from actors.edge.errand import DONE, Errand
from actors.edge.state import Work
from actors.swan.sensors import read_battery, read_celsius
from actors.swan.speed import cpu_score, sample_ms
from raysys.credentials import revealed
from raysys.errors import ConfigError, RemoteError
from raysys.federated.swan.energy import EnergyLoan
from raysys.federated.swan.plans import PlanRefusedError
from raysys.federated.swan.willingness import backoff_s, home_of, quiet_left_s, refusal

LEAST_REST_S = 0.1  # after a lease in vain, whatever the settings: never spin


class DeviceAgent:
    """One device; ``run`` until told to ``stop``.

    Args:
        on_event: called with a dictionary for everything worth telling.
        clock: wall-clock seconds.
    """

    def __init__(
        self,
        config: EdgeDeviceConfig,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.device = Device(config, on_event, clock)
        self.samples = config.samples.load()
        self._failures = 0
        self._fruitless = 0
        self._pace_s = 0.0
        self._sys = Path(config.engine.sys_root)
        _, battery_wh = read_battery(self._sys)
        self.loan = EnergyLoan(battery_wh, config.engine.policy.loan)
        if self.device.state.loan:
            self.loan.load(self.device.state.loan)
        self._trainer = ThreadPoolExecutor(1, thread_name_prefix="swan-train")
        self.errand = Errand(self.device, self.samples, self.loan, self._trainer)

    def stop(self) -> None:
        """End at the next step; work in hand stays on disk."""
        self.device.stopped.set()

    async def run(self) -> int:
        """Work until stopped or until ``rounds`` updates were sent; returns their number.

        Raises:
            RemoteError: enrolment was refused. StorageError: another device has this state folder.
        """
        self.device.folder.lock()
        try:
            await self._enrol()
            while not self._finished():
                await self._once()
        finally:
            self._trainer.shutdown(wait=True)
            self.device.save()
            self.device.folder.unlock()
        return self.errand.updates

    def _finished(self) -> bool:
        enough = 0 < self.device.config.rounds <= self.errand.updates
        return self.device.stopped.is_set() or enough

    async def _once(self) -> None:
        """One offer at most: take up old work, or check in."""
        if self.device.state.work is not None:
            self.device.note(
                "resumed", f"job {self.device.state.work.job_id}, {self.device.state.work.stage}"
            )
            await self.errand.run(self.device.state.work)
            return
        reason, wait_s = self._unwilling()
        if reason:
            self.device.note("unwilling", reason)
            await self.device.sleep(wait_s)
            return
        try:
            work, wait_s = await self._check_in()
        except RemoteError as error:
            await self._offline(error)
            return
        self._failures = 0
        if work is None:
            await self.device.sleep(min(wait_s, self.device.config.most_wait_s))
        else:
            await self._rest(await self.errand.run(work))

    async def _rest(self, outcome: int) -> None:
        """Leave the round that was answered to others; wait longer after each lease in vain."""
        config = self.device.config
        if outcome == DONE:
            self._fruitless = 0
            await self.device.sleep(max(config.rest_s, min(self._pace_s, config.most_wait_s)))
            return
        self._fruitless += 1
        first_s, most_s = max(config.rest_s, LEAST_REST_S), config.most_wait_s
        await self.device.sleep(backoff_s(self._fruitless, random.random(), first_s, most_s))

    async def _offline(self, error: RemoteError) -> None:
        """The gateway is away, or wants to see us enrolled again."""
        self.device.note("offline", str(error))
        if "UNAUTHENTICATED" in error.reason:
            self.device.state.token_until_s = 0.0
            await self._enrol()
            return
        self._failures += 1
        wait_s = backoff_s(self._failures, random.random(), most_s=self.device.config.most_wait_s)
        await self.device.sleep(wait_s)

    async def _enrol(self) -> None:
        """Enrol, or use the enrolment that is remembered; measures the device's speed once."""
        if self.device.state.gateways and self.device.clock() < self.device.state.token_until_s:
            return
        if not self.device.state.sample_ms:
            loop = asyncio.get_running_loop()
            self.device.state.sample_ms = await loop.run_in_executor(self._trainer, sample_ms)
        facts = {
            "client": self.device.config.samples.client,
            "sample_ms": self.device.state.sample_ms,
        }
        facts["samples"] = len(self.samples.targets)

        code = revealed(self.device.config.code, "code")

        async def ask() -> Any:
            async with self.device.edge(self.device.config.server, with_token=False) as client:
                return await client.enrol(code, json.dumps(facts))

        # A wrong address shows at the first enrolment; later ones outlive any loss of network.
        again = bool(self.device.state.gateways)
        ticket = await self.device.patiently("enrolment", ask, None, endless=again)
        if len(ticket.attributes) > 64 or len(ticket.gateways) > 1024 or len(ticket.token) > 8192:
            raise PlanRefusedError(
                self.device.config.server, "an enrolment ticket of unreasonable size"
            )
        self.device.state.token = ticket.token
        self.device.state.token_until_s = self.device.clock() + 0.9 * max(ticket.life_s, 0.0)
        self.device.state.gateways = list(ticket.gateways)
        self.device.state.attributes = list(ticket.attributes)
        self.device.state.schema_version = ticket.schema_version
        self.device.state.mean_sample_ms = ticket.mean_sample_ms
        self.device.save()
        self.device.note("enrolled", self.device.state.device_id)

    def _unwilling(self) -> tuple[str, float]:
        battery, _ = read_battery(self._sys)
        now_s = self.device.clock()
        local_s = now_s + time.localtime(now_s).tm_gmtoff
        loan = self.loan.refusal(local_s, battery)
        settings = self.device.config.willingness
        reason = refusal(settings, local_s, battery, read_celsius(self._sys), loan)
        left_s = quiet_left_s(settings, local_s)
        return reason, min(left_s, self.device.config.idle_s) or self.device.config.idle_s

    async def _check_in(self) -> tuple[Work | None, float]:
        """Offer ourselves at a gateway; the work, or how long to wait."""
        gateways = self.device.config.gateways or tuple(self.device.state.gateways)
        if not gateways:
            raise RemoteError(
                self.device.config.server, "UNAVAILABLE: it names no gateway", "Set gateways"
            )
        device_id = bytes.fromhex(self.device.state.device_id)
        # The next one only while its own does not answer: it holds no lease then.
        place = home_of(device_id, len(gateways)) + self._failures
        address = gateways[place % len(gateways)]
        columns = [np.array([self._attribute(n)], np.float32) for n in self.device.state.attributes]
        mean_ms = self.device.state.mean_sample_ms or self.device.state.sample_ms
        speed = (np.array([self.device.state.sample_ms / mean_ms]), np.ones(1))
        try:
            async with self.device.gateway(address) as client:
                offer = await client.check_in(device_id, columns, 0, speed)
            return self._read_offer(offer, address)
        except (ValueError, IndexError) as error:
            raise RemoteError(address, f"UNKNOWN: a malformed offer ({error})") from error

    def _read_offer(self, offer: Any, address: str) -> tuple[Work | None, float]:
        slot = int(offer.slots[0]) if len(offer.slots) == 1 else -1
        task = offer.tasks.get(slot)
        if slot < 0 or task is None:
            wait_s = float(offer.retry_after_s[0]) if len(offer.retry_after_s) else 1.0
            wait_s = wait_s if np.isfinite(wait_s) else self.device.config.most_wait_s
            self._pace_s = max(wait_s, 0.05)
            return None, self._pace_s
        work = Work(
            gateway_address=address,
            gateway=offer.gateway,
            epoch=offer.epoch,
            counter=int(offer.leases[0]),
            job_id=task.job_id,
            round=task.round,
            endpoint=task.plan_uri.removeprefix("edge://"),
            upload=task.upload_endpoint,
            expires_s=self.device.clock() + float(offer.expiry_s[0]),
            ticket=offer.ticket(0).hex(),
        )
        self.device.note("leased", f"job {work.job_id}, round {work.round}")
        return work, 0.0

    def _attribute(self, name: str) -> float:
        if name == "cpu" and "cpu" not in self.device.config.attributes:
            return cpu_score(self.device.state.sample_ms)
        found = self.device.config.attributes.get(name)
        if found is None:
            known = ", ".join(self.device.config.attributes)
            raise ConfigError("attributes", known, f"a value for {name!r}", "The service asks it")
        return found
