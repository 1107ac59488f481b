"""Federated jobs of this repository take their devices from Venn, as any outside job server does.

:class:`VennDevices` wraps a strategy: for every round it opens a round at the JobPlane, waits until
enough devices were sent to it, trains them, and closes the round. The population's clients play the
devices: they check in at the gateways, and whoever gets a task goes to the job that the task names,
be it this one or another (:mod:`actors.venn.enrolment`). Jobs that share a service and a population
therefore share its devices.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine
from typing import Any, cast

import numpy as np

from actors.venn.client import JobClient
from actors.venn.enrolment import Enrolment, Fleet, client_of
from actors.venn.security import SecurityConfig
from raysys.config import check, check_range
from raysys.errors import ConfigError, InfeasibleError, RemoteError
from raysys.federated.core.devices import CostOf, DeviceConfig, Outcome, response_times
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.messages import IntArray
from raysys.federated.core.population import Population
from raysys.federated.core.privacy import PrivateAvg
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.strategy import (
    RoundReport,
    SelectsDevices,
    Strategy,
    WrappedStrategy,
)
from raysys.federated.venn.gateway import DECLINED, DONE, FAILED

MakeJob = Callable[[Population], FederatedJob]
_EVENT_WAIT_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VennConfig:
    """Where a job gets its devices.

    Args:
        scheduler: address of the JobPlane; gateways: addresses, separated by commas.
        job_id: name of the job, unique in the service.
        requirement: lower bounds by attribute of the service's schema.
        population: name of the device population; jobs that give the same name share devices.
        deadline_s: longest wait for a round's devices; lease_s: how long a device may take.
        rounds: rounds of the job if they are known, which lets the planner see its total demand.
        batch: check-ins in one message.
        host: address at which devices reach this job.
    """

    scheduler: str = "127.0.0.1:7700"
    gateways: str = "127.0.0.1:7701"
    job_id: str = "federated"
    requirement: dict[str, float] = dataclasses.field(default_factory=dict)
    population: str = "clients"
    deadline_s: float = 600.0
    lease_s: float = 600.0
    rounds: int = 0
    batch: int = 256
    host: str = "127.0.0.1"
    security: SecurityConfig = dataclasses.field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        check(self, "scheduler", ":" in self.scheduler, "host:port")
        check(self, "gateways", all(":" in item for item in self.addresses), "host:port,...")
        check(self, "job_id", 1 <= len(self.job_id) <= 200, "1 to 200 characters")
        check_range(self, "deadline_s", 0, low_open=True)
        check_range(self, "lease_s", 0, low_open=True)
        check_range(self, "rounds", 0)
        check_range(self, "batch", 1, 100_000)

    @property
    def addresses(self) -> list[str]:
        """The gateways."""
        return [item.strip() for item in self.gateways.split(",")]


def with_venn(make: MakeJob, config: VennConfig, population: Population) -> FederatedJob:
    """The job that ``make`` builds, with devices from Venn.

    Raises:
        ConfigError: the strategy chooses its devices itself, or its privacy rests on a random draw.
    """
    job = make(population)
    inner = job.strategy
    if isinstance(inner, SelectsDevices):
        raise ConfigError("venn", config.job_id, "none with a strategy that selects devices itself")
    if isinstance(inner, PrivateAvg) and inner.privacy.mode == "central":
        raise ConfigError("venn", config.job_id, "none with central privacy: it needs random draws")
    job.strategy = cast(Strategy, VennDevices(inner, config))
    return job


def finish_job(config: VennConfig) -> dict[str, Any]:
    """Leave the service for good; the job's report.

    Raises:
        RemoteError: the service cannot be reached, or does not know the job.
    """

    async def finish() -> dict[str, Any]:
        async with JobClient(config.scheduler, config.job_id, config.security) as job:
            report = await job.finish()
        return {
            "rounds": report.rounds_done,
            "assigned": report.devices_assigned,
            "failed": report.devices_failed,
        }

    return asyncio.run(finish())


@dataclasses.dataclass(slots=True)
class _Ticket:
    """The round that is open at the JobPlane, and its devices by client."""

    round_id: int
    leases: dict[int, Enrolment]


class VennDevices(WrappedStrategy):
    """A strategy whose devices come from Venn; everything else is the wrapped strategy's.

    Connects at the first round; :meth:`leave` or :func:`finish_job` end the job at the service.
    """

    def __init__(self, inner: Strategy, config: VennConfig) -> None:
        super().__init__(inner)
        self.config = config
        self._calls = 0
        self._ticket: _Ticket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._fleet: Fleet | None = None

    def select(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        round_id: int,
    ) -> Outcome:
        """Open a round, take the devices that Venn sends, and let them answer.

        A round that is selected again is a new attempt: the earlier one is closed as failed.

        Raises:
            ConfigError: several streams of devices. InfeasibleError: too few devices in time.
            RemoteError: the service cannot be reached.
        """
        demands = self.inner.demand(round_id)
        if len(demands) != 1:
            raise ConfigError("venn", len(demands), "a strategy with one stream of devices")
        wanted = demands[0].clients + demands[0].spare
        self._calls += 1
        draw = generator(seed, Purpose.DEVICES, round_id, self._calls)
        suits = np.ones(population.n_clients, dtype=np.bool_)
        if population.rate_mac_s is not None:
            suits &= population.rate_mac_s >= demands[0].min_mac_s
        if population.memory_bytes is not None:
            suits &= population.memory_bytes >= demands[0].min_memory_bytes
        started = self._await(self._recruit(population, wanted, devices.overcommit, suits, draw))
        return _play(population, started, wanted, devices, cost_of, draw)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Close the round at the wrapped strategy and at the JobPlane, and let the devices go."""
        self.inner.close(round_id, report)
        if self._ticket is not None:
            answered = set(report.table.clients[report.table.ok].tolist())
            self._await(self._leave(answered, success=True))

    def leave(self) -> None:
        """Leave the service; may be called twice."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._finish(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            assert self._thread is not None
            self._thread.join()
            loop.close()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _job(self) -> JobClient:
        return JobClient(self.config.scheduler, self.config.job_id, self.config.security)

    async def _recruit(
        self,
        population: Population,
        wanted: int,
        overcommit: float,
        suits: np.ndarray[Any, np.dtype[np.bool_]],
        draw: np.random.Generator,
    ) -> IntArray:
        """Clients of the round, ascending."""
        if self._fleet is None:
            self._fleet = await self._enter(population)
        if self._ticket is not None:
            await self._leave(set(), success=False)
        config, fleet = self.config, self._fleet
        await fleet.release(fleet.arrived(), DECLINED)  # late for an earlier round
        ticket = await self._open(wanted, overcommit, fleet)
        self._ticket = _Ticket(ticket.round_id, {})
        try:
            async with asyncio.timeout(config.deadline_s):
                while len(self._ticket.leases) < ticket.remaining:
                    for order in np.array_split(
                        draw.permutation(population.n_clients),
                        max(population.n_clients // config.batch, 1),
                    ):
                        await fleet.check_in(order)
                        await self._collect(suits)
                        if len(self._ticket.leases) >= ticket.remaining:
                            break
                    await asyncio.sleep(0.01)
        except TimeoutError:
            found = len(self._ticket.leases)
            await self._leave(set(), success=False)
            raise InfeasibleError(
                f"{wanted} devices for {config.job_id}",
                f"Venn sent {found} within {config.deadline_s:g} s",
                "Lower the demand or the requirement, or raise venn.deadline_s",
            ) from None
        return np.sort(np.fromiter(self._ticket.leases, np.int64))

    async def _enter(self, population: Population) -> Fleet:
        """Start the fleet and register."""
        config = self.config
        fleet = Fleet(config.addresses, config.population, population, config.security)
        await fleet.start(config.host)
        async with self._job() as job:
            await self._register(job, fleet)
        return fleet

    async def _register(self, job: JobClient, fleet: Fleet) -> None:
        config = self.config
        await job.register(config.requirement, rounds=config.rounds, upload_endpoint=fleet.endpoint)

    async def _open(self, wanted: int, overcommit: float, fleet: Fleet) -> Any:
        """Open a round; its ticket.

        After a refusal it is tried once more: the service may have forgotten a job that was silent
        for long, and an earlier life of this job may have left a round open.
        """
        config = self.config
        more = {"overcommit": overcommit, "lease_s": config.lease_s}
        async with self._job() as job:
            try:
                return await job.open_round(wanted, config.deadline_s, **more)
            except RemoteError:
                await self._register(job, fleet)
            try:
                async with asyncio.timeout(_EVENT_WAIT_S):
                    async for event in job.events():
                        await job.close_round(event.round_id, success=False)
                        break
            except TimeoutError:
                pass  # nothing was open
            return await job.open_round(wanted, config.deadline_s, **more)

    async def _collect(self, suits: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Take the devices that came; those that do not fit the job are declined."""
        assert self._ticket is not None
        assert self._fleet is not None
        unfit = []
        for enrolment in self._fleet.arrived():
            client = client_of(self.config.population, enrolment.device)
            if 0 <= client < len(suits) and suits[client]:
                self._ticket.leases[client] = enrolment
            else:
                unfit.append(enrolment)
        await self._fleet.release(unfit, DECLINED)

    async def _leave(self, answered: set[int], success: bool) -> None:
        """Release the devices and close the round."""
        assert self._fleet is not None
        ticket, self._ticket = self._ticket, None
        assert ticket is not None
        done = [item for client, item in ticket.leases.items() if client in answered]
        lost = [item for client, item in ticket.leases.items() if client not in answered]
        await self._fleet.release(done, DONE)
        await self._fleet.release(lost, FAILED)
        async with self._job() as job:
            await job.close_round(ticket.round_id, success, answers=len(answered))

    async def _finish(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is None:
            return
        try:
            async with self._job() as job:
                await job.finish()  # its open round ends with it
        finally:
            await fleet.close()


def _play(
    population: Population,
    started: IntArray,
    wanted: int,
    config: DeviceConfig,
    cost_of: CostOf,
    draw: np.random.Generator,
) -> Outcome:
    """Who answers in time; the first ``wanted`` answers are accepted."""
    fails = draw.random(len(started)) < config.failure_rate
    times = response_times(population, started, cost_of)
    limit_s = np.inf if config.deadline_s is None else config.deadline_s
    order = np.lexsort((started, times))
    order = order[~fails[order] & (times[order] <= limit_s)][:wanted]
    accepted = np.sort(started[order])
    full = len(accepted) == wanted or config.deadline_s is None
    duration_s = float(times[order].max(initial=0.0)) if full else float(limit_s)
    bias = None
    if population.rate_mac_s is not None and len(accepted):
        rates = population.rate_mac_s
        bias = float(rates[accepted].mean() / rates[started].mean())
    late = np.setdiff1d(started[~fails], accepted)
    return Outcome(accepted, late, started[fails], duration_s, bias)
