"""Plays a trace of devices and a set of jobs against the live service, in compressed time.

The devices behave as in the simulator (delay, run time, going offline), so that the completion
times of both can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.venn.client import DeviceClient, JobClient
from actors.venn.load import ATOM_VALUES, REQUIREMENTS
from actors.venn.security import SecurityConfig
from raysys.errors import RemoteError
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob
from raysys.federated.venn.simulator.trace import Trace, hash_uniform

VALUES_OF_MASK = dict(zip((0, 1, 3, 5, 15), ATOM_VALUES))
ANSWERED = 0
JOB_PREFIX = "twin-"
_STEP_S = 0.005
_PLANNED_S = 0.5  # for a plan, or a report, to arrive
_WARM_BATCH = 1000
_WARM_IDS = 2**64


@dataclass(slots=True)
class _LiveRound:
    """An open round at its job server: answers in, devices given, and a flag for the end."""

    needed: int
    answered: int = 0
    given: int = 0
    enough: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Twin:
    """The live counterpart of :func:`raysys.federated.venn.simulator.simulate`.

    Args:
        speed: simulated seconds per real second.
        warm_s: check-ins of so many simulated seconds before the start are played at once, with no
            job there to take them: the simulator's supply window starts warm too.
    """

    trace: Trace
    jobs: Sequence[SimJob]
    config: SimConfig
    scheduler: str
    gateway: str
    speed: float = 60.0
    security: SecurityConfig | None = None
    warm_s: float = 0.0
    completion_s: dict[int, float] = field(default_factory=dict)
    assigned: int = 0
    over_assigned: int = 0
    _open: dict[int, _LiveRound] = field(default_factory=dict)
    _started_s: float = 0.0
    _work: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, limit_s: float = float("inf")) -> list[float]:
        """Completion time of every job in simulated seconds; infinite if ``limit_s`` came first."""
        if self.warm_s:
            await self._warm_up()
        self._started_s = time.monotonic()
        async with DeviceClient(self.gateway, self.security) as devices:
            feed = asyncio.create_task(self._devices(devices))
            jobs = [asyncio.create_task(self._job(index)) for index in range(len(self.jobs))]
            everything = asyncio.gather(*jobs)
            with contextlib.suppress(TimeoutError):
                limit = None if np.isinf(limit_s) else limit_s
                await asyncio.wait_for(everything, limit)
            feed.cancel()
            await asyncio.gather(feed, *self._work, return_exceptions=True)
        return [self.completion_s.get(index, float("inf")) for index in range(len(self.jobs))]

    async def _warm_up(self) -> None:
        """Let the service see the supply; its requirements must be known for that."""
        groups = sorted({job.group for job in self.jobs})
        names = [f"{JOB_PREFIX}warm-{group}" for group in groups]
        for group, name in zip(groups, names):
            async with JobClient(self.scheduler, name, self.security) as client:
                await client.register(REQUIREMENTS[group])
        first_s = self.trace.period_s - self.warm_s
        rows = np.arange(self.trace.position_at(first_s), len(self.trace))
        async with DeviceClient(self.gateway, self.security) as devices:
            await asyncio.sleep(_PLANNED_S)
            for part in np.array_split(rows, max(len(rows) // _WARM_BATCH, 1)):
                identities = b"".join(
                    (_WARM_IDS + row).to_bytes(16, "big") for row in part.tolist()
                )
                await devices.check_in(identities, self._values(part), speed=self._speed(part))
            await asyncio.sleep(_PLANNED_S)
        for name in names:
            async with JobClient(self.scheduler, name, self.security) as client:
                await client.finish()

    def _values(self, rows: Any) -> list[Any]:
        """Attribute columns of the devices in these rows."""
        masks = [self.trace.masks[atom] for atom in self.trace.atom[rows]]
        return list(np.asarray([VALUES_OF_MASK[mask] for mask in masks], dtype=np.float32).T)

    def _speed(self, rows: Any) -> tuple[Any, Any]:
        """Compute time and bandwidth over the population's means."""
        return self.trace.compute[rows], 1.0 / self.trace.comm[rows]

    def _now_s(self) -> float:
        """Simulated time."""
        return (time.monotonic() - self._started_s) * self.speed

    async def _job(self, index: int) -> None:
        job = self.jobs[index]
        await asyncio.sleep(job.arrival_s / self.speed)
        async with JobClient(self.scheduler, f"{JOB_PREFIX}{index}", self.security) as client:
            await client.register(REQUIREMENTS[job.group], rounds=job.rounds)
            for _ in range(job.rounds):
                while not await self._attempt(client, index):
                    pass
                await asyncio.sleep(self.config.next_round_s / self.speed)
            self.completion_s[index] = self._now_s() - job.arrival_s
            await client.finish()

    async def _attempt(self, client: JobClient, index: int) -> bool:
        job = self.jobs[index]
        deadline_s = job.deadline_s / self.speed
        live = self._open[index] = _LiveRound(self.config.needed(job.participants))
        ticket = await client.open_round(job.participants, deadline_s, keep_failed=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(live.enough.wait(), deadline_s)
        success = live.enough.is_set() or self.config.succeeds(
            job.participants, live.given, live.answered
        )
        del self._open[index]
        self.over_assigned += max(live.given - job.participants, 0)
        await client.close_round(ticket.round_id, success, answers=0)
        return success

    async def _devices(self, client: DeviceClient) -> None:
        """Check the trace's devices in when their time has come."""
        position = 0
        while True:
            ready = self.trace.position_at(self._now_s())
            if ready > position:
                await self._check_in(client, np.arange(position, ready))
                position = ready
            await asyncio.sleep(_STEP_S)

    async def _check_in(self, client: DeviceClient, positions: Any) -> None:
        rows = positions % len(self.trace)
        identities = b"".join(int(position).to_bytes(16, "big") for position in positions)
        answer = await client.check_in(identities, self._values(rows), speed=self._speed(rows))
        for place in np.flatnonzero(answer.slots >= 0).tolist():
            name = answer.tasks[int(answer.slots[place])].job_id
            if not name.startswith(JOB_PREFIX):
                continue  # somebody else's job on the same service
            live = self._open.get(int(name.removeprefix(JOB_PREFIX)))
            if live is not None:
                live.given += 1
            self.assigned += 1
            work = self._device(
                client, answer.epoch, int(answer.leases[place]), int(positions[place]), name, live
            )
            task = asyncio.create_task(work)
            self._work.add(task)
            task.add_done_callback(self._work.discard)

    async def _device(
        self,
        client: DeviceClient,
        epoch: int,
        lease: int,
        position: int,
        name: str,
        live: _LiveRound | None,
    ) -> None:
        """One device: works, then answers its job, or goes offline first."""
        job = self.jobs[int(name.removeprefix(JOB_PREFIX))]
        row = position % len(self.trace)
        delay_s = self.config.delay_s * float(
            hash_uniform(np.asarray([position]), self.config.seed)[0]
        )
        task_s = job.work_s * self.trace.compute[row] + 2 * job.comm_s * self.trace.comm[row]
        ends_s = self.trace.time_of(position) + delay_s + float(task_s)
        lost = delay_s + task_s > self.trace.online[row]
        if lost:
            return
        await asyncio.sleep(max(ends_s - self._now_s(), 0) / self.speed)
        if live is not None:
            live.answered += 1
            if live.answered >= live.needed:
                live.enough.set()
        with contextlib.suppress(RemoteError):  # its lease may have ended with the round
            await client.release(epoch, [lease], [ANSWERED])
