"""Kills servers at random moments under load and checks the books from the devices' side.

The truth is what devices hold: at no time may more live leases of a round exist than it asked for,
whatever died, and no lease may be lost for good: once the leases of dead gateways have run out,
every round has its devices again. Recovery is the time from the kill of the leader to the next
answered call.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from actors.venn.client import DeviceClient, JobClient
from actors.venn.load import ATOM_SHARES, ATOM_VALUES, REQUIREMENTS
from actors.venn.processes import ProcessDeployment, ServerProcess
from raysys.config import check_range
from raysys.errors import RemoteError

TARGETS = ("gateway", "scheduler", "both")
_PACE_S = 0.02
_PATIENCE_S = 60.0
_SETTLE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosConfig:
    """How much to break.

    Args:
        kills: number of kills; jobs: registered jobs, the first ``open_rounds`` with a round.
        demand: devices per round; lease_s: after which an unanswered device is replaced.
        batch: check-ins per message and gateway, every 20 ms.
    """

    kills: int = 10
    jobs: int = 1000
    open_rounds: int = 40
    demand: int = 100
    lease_s: float = 3.0
    batch: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "kills", 1)
        check_range(self, "jobs", 1)
        check_range(self, "open_rounds", 1, self.jobs)
        check_range(self, "demand", 1)
        check_range(self, "lease_s", 0, low_open=True)
        check_range(self, "batch", 1)


@dataclass(slots=True)
class ChaosReport:
    """What was seen.

    Args:
        recovery_s: one entry per kill of a leader.
        most_live: most live leases of one round at a time.
        longest_gap_s: longest time that an open round went without a new device; leases end all the
            time, so it bounds how long credits of the dead were away.
        least_refilled: after the last kill and the longest lease, the smallest share of its demand
            that any round had at its best.
    """

    kills: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    assigned: int = 0
    over_assigned: int = 0
    most_live: int = 0
    longest_gap_s: float = 0.0
    least_refilled: float = 0.0
    jobs_after: int = 0
    refused_calls: int = 0


@dataclass(eq=False)
class Chaos:
    """One run against a deployment that has a standby."""

    deployment: ProcessDeployment
    config: ChaosConfig
    report: ChaosReport = field(default_factory=ChaosReport)
    _live: dict[str, list[float]] = field(default_factory=dict)
    _given_s: dict[str, float] = field(default_factory=dict)
    _peak: dict[str, int] = field(default_factory=dict)
    _leader: int = 0

    async def run(self) -> ChaosReport:
        """Load, kill, recover, check.

        Raises:
            RemoteError: the service did not come back within a minute.
        """
        generator = np.random.default_rng(self.config.seed)
        await self._open_rounds()
        feeds = [
            asyncio.create_task(self._feed(address, index))
            for index, address in enumerate(self.deployment.gateway_addresses)
        ]
        for _ in range(self.config.kills):
            await asyncio.sleep(float(generator.uniform(0.2, 1.0)))
            await self._kill(str(generator.choice(TARGETS)), generator)
        await asyncio.sleep(self.config.lease_s + _SETTLE_S)
        self._peak.clear()
        await asyncio.sleep(self.config.lease_s)
        names = [f"chaos-{index}" for index in range(self.config.open_rounds)]
        smallest = min(self._peak.get(name, 0) for name in names)
        self.report.least_refilled = smallest / self.config.demand
        for feed in feeds:
            feed.cancel()
        await asyncio.gather(*feeds, return_exceptions=True)
        self.report.jobs_after = len((await self._overview())["jobs"])
        async with JobClient(self.deployment.scheduler_address, "chaos") as job:
            for index in range(self.config.jobs):
                job.job_id = f"chaos-{index}"
                await job.finish()
        return self.report

    async def _open_rounds(self) -> None:
        address = self.deployment.scheduler_address
        async with JobClient(address, "chaos") as job:
            for index in range(self.config.jobs):
                job.job_id = f"chaos-{index}"
                await job.register(REQUIREMENTS[index % len(REQUIREMENTS)], rounds=100)
                if index < self.config.open_rounds:
                    await job.open_round(self.config.demand, 3600, lease_s=self.config.lease_s)

    async def _kill(self, target: str, generator: np.random.Generator) -> None:
        victims: list[ServerProcess] = []
        if target in {"gateway", "both"}:
            victims.append(
                self.deployment.gateways[generator.integers(len(self.deployment.gateways))]
            )
        leader_dies = target in {"scheduler", "both"}
        if leader_dies:
            victims.append(self.deployment.schedulers[self._leader])
            self._leader = 1 - self._leader
        killed_s = time.monotonic()
        for victim in victims:
            victim.kill()
        self.report.kills[target] += 1
        if leader_dies:
            await self._overview()
            self.report.recovery_s.append(time.monotonic() - killed_s)
        self.deployment.supervise()
        for victim in victims:
            await asyncio.to_thread(victim.ready)

    async def _overview(self) -> dict[str, list[object]]:
        until_s = time.monotonic() + _PATIENCE_S
        async with JobClient(self.deployment.scheduler_address, "chaos") as client:
            while True:
                try:
                    overview: dict[str, list[object]] = await client.overview()
                    return overview
                except RemoteError:
                    if time.monotonic() > until_s:
                        raise
                    await asyncio.sleep(0.02)

    async def _feed(self, address: str, index: int) -> None:
        generator = np.random.default_rng((self.config.seed, index))
        values = np.asarray(ATOM_VALUES, dtype=np.float32)
        async with DeviceClient(address) as client:
            while True:
                kinds = generator.choice(len(ATOM_VALUES), self.config.batch, p=ATOM_SHARES)
                identities = generator.bytes(16 * self.config.batch)
                sent_s = time.monotonic()
                try:
                    answer = await client.check_in(identities, list(values[kinds].T))
                except RemoteError:
                    self.report.refused_calls += 1
                    await asyncio.sleep(_PACE_S)
                    continue
                for place in np.flatnonzero(answer.slots >= 0).tolist():
                    name = answer.tasks[int(answer.slots[place])].job_id
                    # Counted from the sending: never longer than the server counts it.
                    self._hold(name, sent_s + float(answer.expiry_s[place]))
                await asyncio.sleep(_PACE_S)

    def _hold(self, name: str, expires_s: float) -> None:
        now_s = time.monotonic()
        if name in self._given_s:
            gap_s = now_s - self._given_s[name]
            self.report.longest_gap_s = max(self.report.longest_gap_s, gap_s)
        self._given_s[name] = now_s
        held = [end_s for end_s in self._live.get(name, ()) if end_s > now_s]
        held.append(expires_s)
        self._live[name] = held
        self._peak[name] = max(self._peak.get(name, 0), len(held))
        self.report.assigned += 1
        self.report.most_live = max(self.report.most_live, len(held))
        self.report.over_assigned += int(len(held) > self.config.demand)
