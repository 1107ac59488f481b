"""A load generator: jobs that ask for devices all the time, and processes that check devices in.

Every answer is checked at the client: no device twice, no ineligible one, never more devices in a
round than it asked for.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.proto.messages import pb
from actors.venn.client import Assignments, DeviceClient, JobClient
from actors.venn.security import SecurityConfig
from raysys.config import check_range
from raysys.errors import RemoteError

# Attribute values (cpu, mem, os) that stand for the five real atoms, and their shares.
ATOM_VALUES = ((0.5, 5, 5), (3, 500, 10), (9, 500, 11), (3, 2000, 11), (12, 2500, 13))
ATOM_SHARES = (35 / 959, 305 / 959, 78 / 959, 124 / 959, 417 / 959)
REQUIREMENTS: tuple[dict[str, float], ...] = (
    {"cpu": 1, "mem": 10, "os": 6},
    {"cpu": 7, "mem": 10, "os": 6},
    {"cpu": 1, "mem": 1000, "os": 6},
    {"cpu": 7, "mem": 1000, "os": 6},
)
_TEMPLATES = 16
JOB_PREFIX = "load-"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """The load.

    Args:
        processes: client processes; batch: check-ins per message; in_flight: messages at a time
            per process.
        rate_per_s: check-ins per second over all processes; 0 sends as fast as answers come.
        duration_s: how long; warm_up_s: not measured before.
        jobs: concurrent jobs; demand: devices per round, lease_s: of each device.
    """

    processes: int = 2
    batch: int = 1000
    in_flight: int = 2
    rate_per_s: float = 0.0
    duration_s: float = 10.0
    warm_up_s: float = 1.0
    jobs: int = 20
    demand: int = 500
    lease_s: float = 2.0
    seed: int = 0
    unary: bool = False

    def __post_init__(self) -> None:
        check_range(self, "processes", 1, 64)
        check_range(self, "batch", 1, 100_000)
        check_range(self, "in_flight", 1, 64)
        check_range(self, "rate_per_s", 0)
        check_range(self, "duration_s", 0, low_open=True)
        check_range(self, "warm_up_s", 0)
        check_range(self, "jobs", 1)
        check_range(self, "demand", 1)
        check_range(self, "lease_s", 0, low_open=True)


@dataclass(slots=True)
class LoadReport:
    """What the clients saw; latencies are round trips of whole batches in seconds."""

    checkins: int = 0
    seconds: float = 0.0
    assigned: int = 0
    ineligible: int = 0
    over_assigned: int = 0
    duplicates: int = 0
    errors: int = 0
    rounds: int = 0
    latencies_s: list[float] = field(default_factory=list)
    by_round: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def rate_per_s(self) -> float:
        return self.checkins / self.seconds if self.seconds else 0.0

    def latency_ms(self, share: float) -> float:
        """Quantile of the latency in milliseconds; NaN without samples."""
        if not self.latencies_s:
            return float("nan")
        return 1000 * float(np.quantile(self.latencies_s, share))


def run_load(
    scheduler: str,
    gateways: Sequence[str],
    config: LoadConfig,
    security: SecurityConfig | None = None,
) -> LoadReport:
    """Drive a running service and check every answer.

    Raises:
        RemoteError: the service cannot be reached.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(config.processes) as pool:
        work = [
            (gateways[index % len(gateways)], config, index, security)
            for index in range(config.processes)
        ]
        pending = pool.starmap_async(device_process, work)
        rounds, demands = asyncio.run(_jobs(scheduler, config, security, pending.ready))
        parts = pending.get(config.duration_s + 60)
    return _merge(parts, rounds, demands)


def device_process(
    gateway: str, config: LoadConfig, index: int, security: SecurityConfig | None
) -> LoadReport:
    """Body of one client process."""
    return asyncio.run(_devices(gateway, config, index, security))


async def _devices(
    gateway: str, config: LoadConfig, index: int, security: SecurityConfig | None
) -> LoadReport:
    report = LoadReport()
    generator = np.random.default_rng((config.seed, index))
    atoms = [
        generator.choice(len(ATOM_VALUES), size=config.batch, p=ATOM_SHARES)
        for _ in range(_TEMPLATES)
    ]
    values = np.asarray(ATOM_VALUES, dtype=np.float32)
    started_s = time.monotonic()
    measure_s, end_s = (
        started_s + config.warm_up_s,
        started_s + config.warm_up_s + config.duration_s,
    )
    gap_s = config.batch * config.processes / config.rate_per_s if config.rate_per_s else 0.0
    next_s = started_s
    async with DeviceClient(gateway, security) as client:

        async def sender() -> None:
            nonlocal next_s
            while (now_s := time.monotonic()) < end_s:
                if gap_s:
                    due_s, next_s = next_s, max(next_s, now_s - 1.0) + gap_s
                    await asyncio.sleep(max(due_s - now_s, 0))
                kinds = atoms[int(generator.integers(_TEMPLATES))]
                identities = generator.bytes(16 * config.batch)
                sent_s = time.monotonic()
                try:
                    answer = await client.check_in(identities, list(values[kinds].T))
                except RemoteError:
                    report.errors += 1
                    await asyncio.sleep(0.05)
                    continue
                done_s = time.monotonic()
                _verify(report, answer, kinds)
                if done_s >= measure_s:
                    report.checkins += config.batch
                    report.latencies_s.append(done_s - sent_s)

        await asyncio.gather(*(sender() for _ in range(config.in_flight)))
    report.seconds = time.monotonic() - measure_s
    return report


def _verify(report: LoadReport, answer: Assignments, kinds: Any) -> None:
    given = np.flatnonzero(answer.slots >= 0)
    report.assigned += len(given)
    if len(np.unique(answer.leases[given])) != len(given):
        report.duplicates += 1
    for slot, task in answer.tasks.items():
        if not task.job_id.startswith(JOB_PREFIX):
            continue  # somebody else's job on the same service
        mine = given[answer.slots[given] == slot]
        requirement = REQUIREMENTS[int(task.job_id.rpartition("/")[2])]
        bounds = np.asarray([requirement[name] for name in ("cpu", "mem", "os")])
        fit = (np.asarray(ATOM_VALUES)[kinds[mine]] >= bounds).all(axis=1)
        report.ineligible += int((~fit).sum())
        report.by_round[task.job_id, task.round] += len(mine)


async def _jobs(
    scheduler: str, config: LoadConfig, security: SecurityConfig | None, done: Any
) -> tuple[int, dict[str, int]]:
    """Jobs that open a round, wait until it is filled, close it, and so on until ``done``."""
    names = [f"{JOB_PREFIX}{index}/{index % len(REQUIREMENTS)}" for index in range(config.jobs)]
    tasks = [asyncio.create_task(_one_job(scheduler, name, config, security)) for name in names]
    while not done():
        failed = [task for task in tasks if task.done()]
        if failed:
            failed[0].result()
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    rounds = 0
    for name in names:
        async with JobClient(scheduler, name, security) as job:
            rounds += int((await job.finish()).rounds_done)
    return rounds, dict.fromkeys(names, config.demand)


async def _one_job(
    scheduler: str, name: str, config: LoadConfig, security: SecurityConfig | None
) -> None:
    requirement = REQUIREMENTS[int(name.rpartition("/")[2])]
    async with JobClient(scheduler, name, security) as job:
        await job.register(requirement)
        more = {"deadline_s": 600, "lease_s": config.lease_s, "keep_failed": True}
        ticket = await job.open_round(config.demand, **more)
        async for event in job.follow():
            if event.kind == pb.JobEvent.FILLED and event.round_id == ticket.round_id:
                await job.close_round(ticket.round_id, success=True)
                ticket = await job.open_round(config.demand, **more)


def _merge(parts: Sequence[LoadReport], rounds: int, demands: dict[str, int]) -> LoadReport:
    total = LoadReport(rounds=rounds)
    for part in parts:
        total.checkins += part.checkins
        total.seconds = max(total.seconds, part.seconds)
        total.assigned += part.assigned
        total.ineligible += part.ineligible
        total.duplicates += part.duplicates
        total.errors += part.errors
        total.latencies_s += part.latencies_s
        total.by_round.update(part.by_round)
    for (job_id, _), count in total.by_round.items():
        total.over_assigned += max(count - demands[job_id], 0)
    return total
