"""A federated job whose devices Venn grants: rounds opened, updates awaited, server steps made."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.venn.client import JobClient
from raysys.config import check_range
from raysys.errors import InfeasibleError, RemoteError
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.population import Population
from raysys.federated.core.strategy import JobFacts, RoundReport, Strategy
from raysys.federated.swan.plans import pack_weights
from raysys.federated.swan.rounds import Admission, EdgeRound, LeaseKey

NORM_MEMORY = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeJobConfig:
    """One job.

    Args:
        job_id: its name at Venn. requirement: lower bounds on the attributes of a check-in.
        clients_per_round: updates wanted. deadline_s: longest round.
        lease_s: how long a silent device keeps its place, 0 until the deadline; devices renew.
        overcommit: devices asked for, over those wanted. fraction: share that must answer.
        max_attempts: times that a round which kept too few updates is repeated.
    """

    job_id: str = "edge"
    requirement: dict[str, float] = field(default_factory=dict)
    clients_per_round: int = 10
    deadline_s: float = 60.0
    lease_s: float = 0.0
    overcommit: float = 1.0
    fraction: float = 0.8
    max_attempts: int = 5
    screen: ScreenConfig = field(default_factory=ScreenConfig)

    def __post_init__(self) -> None:
        check_range(self, "clients_per_round", 1)
        check_range(self, "deadline_s", 0, low_open=True)
        check_range(self, "lease_s", 0)
        check_range(self, "overcommit", 1, 10)
        check_range(self, "fraction", 0, 1, low_open=True)
        check_range(self, "max_attempts", 1)


class EdgeJob:
    """Drives a strategy over rounds.

    Args:
        clients: number of clients of the population. address: where devices reach the edge plane.
    """

    def __init__(
        self,
        config: EdgeJobConfig,
        strategy: Strategy,
        clients: int,
        seed: int,
        plane: JobClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.strategy, self.seed = config, strategy, seed
        self.address = ""
        self.opened: EdgeRound | None = None
        self.model = b""
        self.model_sha256 = b""
        self.reports: list[RoundReport] = []
        self.refused = 0
        self.repeats = 0
        self._plane, self._clock = plane, clock
        self._secret = secrets.token_bytes(32)
        self._norms: list[float] = []
        self._answered = asyncio.Event()
        self._lowest_round = 0
        self._highest_round = 0
        offsets = np.zeros(clients + 1, dtype=np.int64)
        population = Population(offsets=offsets, sample_ids=np.zeros(0, dtype=np.int32))
        strategy.start(JobFacts(population, seed))

    def admit(self, lease: LeaseKey, venn_round: int, device: bytes, client: int) -> Admission:
        """Plan of a lease.

        Raises:
            InfeasibleError: no round is open, or the lease is of an earlier one.
        """
        if self.opened is None or venn_round < self._lowest_round:
            raise InfeasibleError("this lease", "its round is over", "Check in again")
        admission = self.opened.admit(lease, device, client)
        self._highest_round = max(self._highest_round, venn_round)
        return admission

    def answer(self, lease: LeaseKey, device: bytes, nonce: bytes, content: bytes) -> bool:
        """An update; see :meth:`EdgeRound.answer`."""
        if self.opened is None:
            raise InfeasibleError("this update", "its round is over", "Check in again")
        accepted = self.opened.answer(lease, device, nonce, content)
        if self.opened.complete:
            self._answered.set()
        return accepted

    async def run(
        self, rounds: int, on_round: Callable[[int, RoundReport], None] | None = None
    ) -> None:
        """Register, run rounds, leave.

        Raises:
            RemoteError: Venn refuses or cannot be reached. InfeasibleError: a round failed often.
        """
        await self._plane.register(
            self.config.requirement,
            rounds=rounds,
            plan_uri=f"edge://{self.address}",
            upload_endpoint=self.address,
        )
        try:
            for round_id in range(rounds):
                report = await self._round(round_id)
                self.reports.append(report)
                if on_round is not None:
                    on_round(round_id, report)
        finally:
            self.opened = None
        await self._plane.finish()

    async def _round(self, round_id: int) -> RoundReport:
        for _ in range(self.config.max_attempts):
            report = await self._attempt(round_id)
            if report is not None:
                return report
            self.repeats += 1
        raise InfeasibleError(
            f"round {round_id}",
            f"too few updates in {self.config.max_attempts} attempts",
            "Raise deadline_s or overcommit, or lower fraction",
        )

    async def _attempt(self, round_id: int) -> RoundReport | None:
        config = self.config
        started_s = self._clock()
        self.model = pack_weights(self.strategy.weights(0))
        self.model_sha256 = hashlib.sha256(self.model).digest()
        opened = EdgeRound(
            self.strategy,
            round_id,
            config.clients_per_round,
            seed=self.seed,
            secret=self._secret,
            screen=config.screen,
            reject_above=self._reject_above(),
        )
        self._answered.clear()
        self._lowest_round = self._highest_round + 1 if self._highest_round else 0
        self.opened = opened
        ticket = await self._plane.open_round(
            config.clients_per_round,
            config.deadline_s,
            overcommit=config.overcommit,
            fraction=config.fraction,
            lease_s=config.lease_s,
        )
        try:
            async with asyncio.timeout(config.deadline_s):
                await self._answered.wait()
        except TimeoutError:
            pass
        self.opened = None
        self.refused += opened.refused
        needed = math.ceil(config.fraction * config.clients_per_round)
        success = opened.answers >= needed
        times = opened.response_s()
        slowest_s = float(np.percentile(times, 95)) if times else 0.0
        await self._close(ticket, success, opened.answers, slowest_s)
        if not success:
            return None
        report = opened.close(self._clock() - started_s)
        norms = opened.norms()
        self._norms = [*self._norms[1 - NORM_MEMORY :], float(np.median(norms))]
        return report

    async def _close(self, ticket: Any, success: bool, answers: int, response_s: float) -> None:
        try:
            await self._plane.close_round(ticket.round_id, success, answers, response_s)
        except RemoteError as error:
            # An expired round has been closed by Venn itself; the updates are ours all the same.
            if "FAILED_PRECONDITION" not in error.reason:
                raise

    def _reject_above(self) -> float:
        factor = self.config.screen.reject_factor
        if factor is None or not self._norms:
            return math.inf
        return factor * float(np.median(self._norms))
