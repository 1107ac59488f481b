"""One population of phones, several federated jobs, one scheduler: an event-driven simulation.

Phones check in while they are online and owe nothing; a policy of Venn (or a rival) offers each to
the open rounds; a granted phone trains at the pace and energy of its own choice of cores; a round
closes when enough answers are in, and its learning is real.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from raysys.compose.phones import DAY_S, Phones
from raysys.config import check_range
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.venn.requests import Plan, Policy, Request
from raysys.federated.venn.simulator.rounds import draw_priority
from raysys.federated.venn.supply import SupplyView

IntArray = npt.NDArray[np.int64]
Learn = Callable[[int, IntArray], None]
HOUR_S, HOURS = 3600.0, 24
OPEN, CHECKIN, END, DEADLINE = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FleetJob:
    """What a job asks of the population.

    Args:
        group: bit of its requirement in the phones' masks. participants: phones of a round.
        fraction: share of them that must answer. local_steps: steps of a task.
        deadline_s: longest duration of an attempt. arrival_s: registration.
    """

    name: str
    group: int
    participants: int
    rounds: int
    local_steps: int = 100
    fraction: float = 0.8
    deadline_s: float = 7200.0
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("participants", "rounds", "local_steps"):
            check_range(self, name, 1)
        check_range(self, "fraction", 0, 1, low_open=True)
        check_range(self, "deadline_s", 0, low_open=True)

    @property
    def needed(self) -> int:
        """Answers that close a round."""
        return max(1, math.ceil(self.fraction * self.participants - 1e-9))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedFleetConfig:
    """Clockwork of a run; the simulation gives up after ``days``."""

    checkin_s: float = 900.0
    next_round_s: float = 5.0
    days: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "checkin_s", 0, low_open=True)
        check_range(self, "next_round_s", 0, low_open=True)
        check_range(self, "days", 0, low_open=True)


@dataclasses.dataclass(slots=True)
class JobOutcome:
    """What a job got: end (infinite if unfinished), failed attempts, phones, energy."""

    name: str
    arrival_s: float
    finish_s: float = math.inf
    aborted: int = 0
    assigned: int = 0
    answered: int = 0
    joules: float = 0.0
    closes_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def completion_s(self) -> float:
        """Seconds from registration to the last round's close."""
        return self.finish_s - self.arrival_s


@dataclasses.dataclass(slots=True)
class _Task:
    """A phone at work, always for the open attempt of its job."""

    job: int
    serial: int
    start_s: float
    seconds: float
    joules: float


@dataclasses.dataclass(slots=True)
class _Run:
    """A job in flight; ``taken`` and ``answered`` are phones of the open attempt."""

    job: FleetJob
    request: Request
    outcome: JobOutcome
    open: bool = False
    taken: set[int] = dataclasses.field(default_factory=set)
    answered: list[int] = dataclasses.field(default_factory=list)


def run_shared(
    phones: Phones,
    masks: IntArray,
    jobs: Sequence[FleetJob],
    policy: Policy,
    learn: Sequence[Learn],
    config: SharedFleetConfig | None = None,
) -> list[JobOutcome]:
    """Run all jobs to their end; ``learn[i](round, phones)`` is called at each close of job i.

    Args:
        masks: bit g of a phone's mask says that it meets the requirement of group g, int64 [N].

    Raises:
        ConfigError: no jobs, or not one learner for each, or masks of another length.
        InfeasibleError: too few phones meet a job's requirement, or days ran out.
    """
    if not jobs or len(learn) != len(jobs):
        raise ConfigError("jobs", len(jobs), "one or more, with a learner each")
    if masks.shape != (len(phones),):
        raise ConfigError("masks", masks.shape, f"one for each of {len(phones)} phones")
    for job in jobs:
        able = int((masks >> job.group & 1).sum())
        if able < job.participants:
            reason = f"{able} phones meet its requirement, a round asks for {job.participants}"
            raise InfeasibleError(f"job {job.name}", reason, "Ask for fewer")
    return _Engine(phones, masks, jobs, policy, learn, config or SharedFleetConfig()).run()


class _Engine:
    """State of a run."""

    def __init__(
        self, phones: Phones, masks: IntArray, jobs: Sequence[FleetJob], policy: Policy,
        learn: Sequence[Learn], config: SharedFleetConfig,
    ) -> None:  # fmt: skip
        self.phones, self.policy, self.learn, self.config = phones, policy, learn, config
        kinds, self.atoms = np.unique(masks, return_inverse=True)
        self.masks = tuple(int(mask) for mask in kinds)
        self.groups = max(job.group for job in jobs) + 1
        self.runs = [
            _Run(
                job,
                Request(job=i, group=job.group, demand=job.participants, remaining=0,
                        rounds=job.rounds, registered_s=job.arrival_s),
                JobOutcome(job.name, job.arrival_s),
            )
            for i, job in enumerate(jobs)
        ]  # fmt: skip
        self.tasks: dict[int, _Task] = {}
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.serial = self.started = 0
        self.plan: Plan | None = None
        self.planned_s = -math.inf
        per_hour = np.bincount(self.atoms, minlength=len(kinds)) * HOUR_S / config.checkin_s
        self.seen = np.tile(per_hour / 4.0, (HOURS, 1))  # a guess, replaced within a day
        self.hour = -1

    def run(self) -> list[JobOutcome]:
        for index, run in enumerate(self.runs):
            self._push(run.job.arrival_s, OPEN, index)
        for phone in range(len(self.phones)):
            self._push(self.phones.first_checkin_s(phone, self.config.checkin_s), CHECKIN, phone)
        limit_s = self.config.days * DAY_S
        while any(math.isinf(run.outcome.finish_s) for run in self.runs):
            now_s, _, kind, who, mark = heapq.heappop(self.heap)
            if now_s > limit_s:
                late = [run.job.name for run in self.runs if math.isinf(run.outcome.finish_s)]
                reason = f"{', '.join(late)} did not finish in {self.config.days:g} days"
                raise InfeasibleError("the shared fleet", reason, "Lower demand, or give more days")
            if kind == CHECKIN:
                self._checkin(who, now_s)
            elif kind == END:
                self._ended(who, mark, now_s)
            elif kind == OPEN:
                self._open(self.runs[who], now_s, again=False)
            elif self.runs[who].open and self.runs[who].request.attempt == mark:
                self._close(self.runs[who], now_s, success=False)
        return [run.outcome for run in self.runs]

    def _push(self, time_s: float, kind: int, who: int, mark: int = 0) -> None:
        self.serial += 1
        heapq.heappush(self.heap, (time_s, self.serial, kind, who, mark))

    def _again(self, phone: int, now_s: float) -> None:
        self._push(self.phones.next_checkin_s(phone, now_s, self.config.checkin_s), CHECKIN, phone)

    def _open(self, run: _Run, now_s: float, *, again: bool) -> None:
        request = run.request
        request.remaining = run.job.participants
        request.attempt += 1
        if not again:
            request.opened_s = now_s
        request.priority = draw_priority(self.config.seed, request.job, request.attempt)
        run.open, run.taken, run.answered = True, set(), []
        self._push(now_s + run.job.deadline_s, DEADLINE, request.job, request.attempt)
        self.plan = None

    def _checkin(self, phone: int, now_s: float) -> None:
        atom = int(self.atoms[phone])
        self._count(atom, now_s)
        left_s = self.phones.left_s(phone, now_s)
        request = None
        if left_s > 0.0 and not self.phones.owes(phone, now_s):
            request = self._offer(phone, atom, now_s)
        if request is None:
            self._again(phone, now_s)
            return
        run = self.runs[request.job]
        cost = self.phones.cost(phone, run.job.local_steps)
        self.started += 1
        self.tasks[phone] = _Task(request.job, self.started, now_s, cost.seconds, cost.joules)
        self._push(now_s + min(cost.seconds, left_s), END, phone, self.started)
        run.taken.add(phone)
        run.outcome.assigned += 1
        request.remaining -= 1
        if not request.remaining:
            self.plan = None

    def _offer(self, phone: int, atom: int, now_s: float) -> Request | None:
        """The request that a phone goes to; at most once to a round."""
        if self.plan is None or now_s >= self.planned_s + HOUR_S:
            waiting = [run.request for run in self.runs if run.open and run.request.remaining]
            rates = self.seen.sum(axis=0) / (HOURS * HOUR_S)
            supply = SupplyView.build(self.masks, rates.tolist(), self.groups)
            self.plan, self.planned_s = self.policy.plan(waiting, supply, now_s), now_s
        for request in self.plan.ranking(atom):
            if request.remaining > 0 and phone not in self.runs[request.job].taken:
                return request
        return None

    def _ended(self, phone: int, serial: int, now_s: float) -> None:
        task = self.tasks.get(phone)
        if task is None or task.serial != serial:
            return  # let go when its round closed
        run = self.runs[task.job]
        answered = now_s - task.start_s >= task.seconds * (1.0 - 1e-9)
        self._free(phone, now_s)
        if not (run.open and answered):
            return
        run.answered.append(phone)
        if len(run.answered) >= run.job.needed:
            self._close(run, now_s, success=True)

    def _free(self, phone: int, now_s: float) -> None:
        """Book what a phone has spent so far and let it check in again."""
        task = self.tasks.pop(phone)
        share = min((now_s - task.start_s) / task.seconds, 1.0)
        self.phones.spend(phone, share * task.joules, now_s)
        self.runs[task.job].outcome.joules += share * task.joules
        self._again(phone, now_s)

    def _close(self, run: _Run, now_s: float, *, success: bool) -> None:
        request, outcome = run.request, run.outcome
        run.open, request.remaining, self.plan = False, 0, None
        for phone in [p for p, task in self.tasks.items() if task.job == request.job]:
            self._free(phone, now_s)
        if not success:
            outcome.aborted += 1
            self._open(run, now_s, again=True)
            return
        self.learn[request.job](request.rounds_done, np.sort(np.array(run.answered, np.int64)))
        outcome.answered += len(run.answered)
        outcome.closes_s.append(now_s)
        request.rounds_done += 1
        if request.rounds_done == run.job.rounds:
            outcome.finish_s = now_s
        else:
            self._push(now_s + self.config.next_round_s, OPEN, request.job)

    def _count(self, atom: int, now_s: float) -> None:
        hour = int(now_s // HOUR_S)
        while self.hour < hour:
            self.hour += 1
            self.seen[self.hour % HOURS] = 0.0
        self.seen[hour % HOURS, atom] += 1.0


def masks_of(scores: npt.NDArray[np.float64], bounds: Sequence[float]) -> IntArray:
    """Bit g is set where a phone's score is at least ``bounds[g]``; int64 [N]."""
    check_bounds = [bound for bound in bounds if not math.isfinite(bound)]
    if check_bounds:
        raise ConfigError("bounds", check_bounds, "finite numbers")
    found = np.zeros(len(scores), dtype=np.int64)
    for group, bound in enumerate(bounds):
        found |= (scores >= bound).astype(np.int64) << group
    return found
