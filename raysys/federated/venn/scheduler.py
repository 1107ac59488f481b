"""The scheduler as a deterministic state machine: command in, reply and events out.

Every command carries its time. The same commands in the same order give the same state and the same
plan, which is what the log, the standby and the replay test rest on (our design; paper, section 4.5
names only the parts). A command that is refused changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.federated.venn import baselines
from raysys.federated.venn.capability import CLASSES
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy, Request
from raysys.federated.venn.requirements import Requirement
from raysys.federated.venn.scheduler_plans import (
    SUPPLY_PATIENCE_S,
    explain,
    make_plan,
    never_seen,
    overview,
    rebalance_needed,
    supply_view,
)
from raysys.federated.venn.scheduler_state import (
    JobState,
    RoundState,
    SchedulerState,
    ServiceConfig,
)
from raysys.federated.venn.scheduler_usage import bury, join, report
from raysys.federated.venn.tiers import TieredPolicy, TierMatcher

Command = Mapping[str, Any]
Reply = dict[str, Any]
_STATE = TypeAdapter(SchedulerState)

POLICIES: dict[str, Callable[[float], Policy]] = {
    "irs": lambda eps: IRS(IRSConfig(eps=eps)),
    "irs-total": lambda eps: IRS(IRSConfig(demand_scope="total", eps=eps)),
    "irs-yield": lambda eps: IRS(IRSConfig(demand_scope="total", eps=eps, yield_factor=2.0)),
    "random": lambda eps: baselines.random_per_request(),
    "round-robin": lambda eps: baselines.round_robin(),
    "fifo": lambda eps: baselines.fifo(),
    "srsf": lambda eps: baselines.srsf(),
    "srsf-total": lambda eps: baselines.srsf_total(),
    "least-attained": lambda eps: baselines.least_attained(),
}


@dataclass(slots=True)
class SchedulerCore:
    """State machine behind the scheduler actor; ``events`` collects what jobs should hear."""

    config: ServiceConfig = field(default_factory=ServiceConfig)
    state: SchedulerState = field(default_factory=SchedulerState)
    events: list[tuple[str, Reply]] = field(default_factory=list)
    merged_atoms: int = 0
    rounds: dict[int, JobState] = field(default_factory=dict)
    policy: Policy = field(default_factory=IRS)
    matcher: TierMatcher = field(default_factory=TierMatcher)

    def __post_init__(self) -> None:
        if self.config.policy not in POLICIES:
            expected = "one of " + ", ".join(POLICIES)
            raise ConfigError("service.policy", self.config.policy, expected)
        self.policy = POLICIES[self.config.policy](self.config.eps)
        self.state.supply.config = self.config.supply
        self._index()

    def tiered(self) -> Policy:
        """The policy, with tier matching where it is on."""
        return self.policy if self.config.tiers == 1 else TieredPolicy(self.policy, self.matcher)

    def apply(self, command: Command) -> Reply:
        """Carry out one command ``{"op": ..., "now": seconds, ...}``.

        Raises:
            ConfigError, InfeasibleError: the command is refused; the state is as before.
        """
        operation = _OPERATIONS.get(str(command.get("op")))
        if operation is None:
            raise ConfigError("op", command.get("op"), "one of " + ", ".join(_OPERATIONS))
        return operation(self, command)

    def dump(self) -> str:
        """The state as JSON."""
        self.state.tiers = self.matcher.state_dict()
        return _STATE.dump_json(self.state).decode()

    def load(self, text: str) -> None:
        """Replace the state.

        Raises:
            DataError: the snapshot is damaged or of another version.
        """
        try:
            self.state = _STATE.validate_json(text)
        except ValueError as error:
            reason = f"not a snapshot of this version ({str(error).splitlines()[0]})"
            raise DataError("snapshot", reason, "Remove it; the log alone suffices") from error
        self.state.supply.config = self.config.supply
        self._index()

    def _register(self, command: Command) -> Reply:
        state, now_s = self.state, float(command["now"])
        job_id = str(command["job_id"])
        if not job_id or len(job_id) > 200:
            raise ConfigError("job_id", job_id, "1 to 200 characters")
        requirement = Requirement.from_mapping(command["requirement"])
        for name, bound in requirement.bounds:
            if name not in self.config.schema.attributes:
                expected = "one of " + ", ".join(self.config.schema.attributes)
                raise ConfigError(f"requirement.{name}", bound, expected)
        known = state.jobs.get(job_id)
        if known is not None:
            if state.requirements[known.group] != requirement:
                raise ConfigError("job_id", job_id, "a new name", "It is taken by another job")
            known.seen_s = now_s
            known.rounds = int(command.get("rounds") or known.rounds)
            known.plan_uri = str(command.get("plan_uri") or known.plan_uri)
            known.upload_endpoint = str(command.get("upload_endpoint") or known.upload_endpoint)
            state.dirty = True
            return {"slot": known.slot}
        response_s = float(command.get("response_s") or 90.0)
        if not (math.isfinite(response_s) and response_s > 0):
            raise ConfigError("response_s", response_s, "a positive number of seconds")
        state.jobs[job_id] = JobState(
            job_id,
            state.next_slot,
            self._group(requirement),
            now_s,
            now_s,
            rounds=int(command.get("rounds", 0)),
            response_s=response_s,
            nominal_s=float(command.get("response_s") or 0.0),
            plan_uri=str(command.get("plan_uri", "")),
            upload_endpoint=str(command.get("upload_endpoint", "")),
        )
        state.next_slot += 1
        state.dirty = True
        return {"slot": state.next_slot - 1}

    def _group(self, requirement: Requirement) -> int:
        if requirement not in self.state.requirements:
            self.state.requirements.append(requirement)
        return self.state.requirements.index(requirement)

    def _open(self, command: Command) -> Reply:
        state, now_s = self.state, float(command["now"])
        job = self.job(command)
        if job.open is not None and not job.open.expired:
            raise ConfigError("job_id", job.job_id, "no open round", "Close the open round first")
        demand = _whole(command, "demand", 1, self.config.max_demand)
        deadline_s = _positive(command, "deadline_s")
        if deadline_s < job.nominal_s:
            expected = f"at least the job's nominal task time of {job.nominal_s:g} s"
            raise ConfigError("deadline_s", deadline_s, expected)
        overcommit = float(command.get("overcommit") or 1.0)
        if not 1 <= overcommit <= 10:
            raise ConfigError("overcommit", overcommit, "a number in [1, 10]")
        fraction = float(command.get("fraction") or 0.8)
        if not 0 < fraction <= 1:
            raise ConfigError("fraction", fraction, "a number in (0, 1]")
        lease_s = float(command.get("lease_s") or deadline_s)
        if not (math.isfinite(lease_s) and lease_s > 0):
            raise ConfigError("lease_s", lease_s, "a positive number of seconds")
        if job.open is not None:
            self._leave_round(job)
        if job.attempts == 0:
            job.round_opened_s = now_s
        job.attempts += 1
        job.seen_s = now_s
        job.open = RoundState(
            state.next_round,
            job.rounds_done,
            demand,
            overcommit,
            deadline_s,
            now_s,
            min(lease_s, deadline_s),
            not command.get("keep_failed", False),
        )
        state.next_round += 1
        self.rounds[job.open.round_id] = job
        self.matcher.deadlines_s[job.slot] = deadline_s
        state.dirty = True
        return {
            "round_id": job.open.round_id,
            "remaining": job.open.remaining,
            "warnings": self._warnings(job, demand, now_s),
        }

    def _warnings(self, job: JobState, demand: int, now_s: float) -> list[str]:
        if self.state.supply.seen < self.config.supply.min_samples:
            return []
        view = supply_view(self, now_s)
        if never_seen(self, job.group, view, now_s):
            return ["UNSATISFIABLE"]
        likely = demand > view.group_rates[job.group] * SUPPLY_PATIENCE_S
        return ["LIKELY_UNSATISFIABLE"] if likely else []

    def _add(self, command: Command) -> Reply:
        job, opened = self._round_of(command)
        if opened.expired:
            raise InfeasibleError(f"round {opened.round_id}", "its deadline has passed", "Close it")
        opened.extra += _whole(command, "devices", 1, self.config.max_demand)
        opened.filled = False
        job.seen_s = float(command["now"])
        self.state.dirty = True
        return {"round_id": opened.round_id, "remaining": opened.remaining}

    def _close(self, command: Command) -> Reply:
        job, opened = self._round_of(command)
        answers = _whole(command, "answers", 0, self.config.max_demand)
        if answers > opened.charged:
            expected = f"at most the {opened.charged} leases of the round"
            raise ConfigError("answers", answers, expected)
        response_s = float(command.get("response_s") or 0.0)
        if not (math.isfinite(response_s) and response_s >= 0):
            raise ConfigError("response_s", response_s, "a finite number >= 0")
        job.seen_s = float(command["now"])
        if command.get("success"):
            job.rounds_done += 1
            job.attempts = 0
            if response_s:
                job.response_s = 0.7 * job.response_s + 0.3 * response_s
            self._learn(job, opened)
        else:
            job.rounds_aborted += 1
        self._leave_round(job, answers)
        return {}

    def _learn(self, job: JobState, opened: RoundState) -> None:
        """What a successful round taught about the job's devices (tier matching)."""
        if not opened.answers or not opened.filled_s:
            return
        kinds, times = zip(*opened.answers)
        request = Request(job.slot, job.group, opened.demand, 0, attempt=opened.round_id)
        fill_s = opened.filled_s - opened.opened_s
        self.matcher.observe(request, fill_s, np.asarray(kinds), np.asarray(times))

    def _finish(self, command: Command) -> Reply:
        job = self.job(command)
        self._remove(job, "finished")
        return {
            "rounds_done": job.rounds_done,
            "rounds_aborted": job.rounds_aborted,
            "assigned": job.assigned,
            "failed": job.failed,
            "completion_s": float(command["now"]) - job.registered_s,
        }

    def _remove(self, job: JobState, reason: str) -> None:
        self._leave_round(job)
        self.matcher.forget(job.slot)
        del self.state.jobs[job.job_id]
        self.events.append((job.job_id, {"kind": "GONE", "reason": reason}))

    def _leave_round(self, job: JobState, answers: int = 0) -> None:
        opened = job.open
        if opened is None:
            return
        # A quick round ends before its last usage is reported: who answered was assigned.
        job.assigned += max(opened.spent, answers)
        job.failed += opened.failed
        job.open = None
        del self.rounds[opened.round_id]
        self.state.dirty = True
        self.events.append((job.job_id, {"kind": "CLOSED", "round_id": opened.round_id}))

    def _tick(self, command: Command) -> Reply:
        """Deadlines, silent jobs, leases lost with dead gateways, and the gateways that died.

        Who is dead is the leader's finding and comes with the command, because signs of life are
        not logged.
        """
        now_s = float(command["now"])
        for name in command.get("dead", ()):
            if name in self.state.gateways:
                bury(self, name, now_s, self.config.fence_s)
        for job in list(self.state.jobs.values()):
            if self._gone(job, now_s):
                self._remove(job, "silent or too old")
            elif job.open is not None:
                self._tick_round(job, job.open, now_s)
        return {}

    def explain(self, job_id: str, now_s: float) -> Reply:
        """Why a job waits; see :mod:`scheduler_plans`."""
        return explain(self, job_id, now_s)

    def overview(self, now_s: float) -> Reply:
        """Jobs, groups and supply for a live view."""
        return overview(self, now_s)

    def rebalance_needed(self) -> bool:
        """Whether credits lie where no devices come, or freed credit is not granted again."""
        return rebalance_needed(self)

    def tick_due(self, now_s: float) -> bool:
        """Whether a ``tick`` at this time would change anything."""
        return any(
            self._gone(job, now_s) or (job.open is not None and job.open.due(now_s))
            for job in self.state.jobs.values()
        )

    def _gone(self, job: JobState, now_s: float) -> bool:
        silent = now_s - job.seen_s > self.config.job_max_silent_s
        return silent or now_s - job.registered_s > self.config.job_max_life_s

    def _tick_round(self, job: JobState, opened: RoundState, now_s: float) -> None:
        due = [entry for entry in opened.returns if entry.back_s <= now_s]
        if due:
            opened.returns = [entry for entry in opened.returns if entry.back_s > now_s]
            for entry in due:
                # Assigned or not, their leases are over: unknown ones go back to the demand.
                opened.lost -= entry.unknown
                opened.settled_failed += entry.live
            opened.filled = False
            self.state.dirty = True
        if not opened.expired and now_s >= opened.opened_s + opened.deadline_s:
            opened.expired = True
            self.state.dirty = True
            details = {"round_id": opened.round_id, "assigned": opened.spent}
            self.events.append((job.job_id, {"kind": "EXPIRED", **details}))

    def _lead(self, command: Command) -> Reply:
        """A leader takes over: the epoch moves on."""
        self.state.epoch += 1
        self.state.dirty = True
        return {"epoch": self.state.epoch}

    def state_of(self, round_id: int) -> RoundState:
        """An open round by its id."""
        opened = self.rounds[round_id].open
        assert opened is not None
        return opened

    def job(self, command: Command) -> JobState:
        job = self.state.jobs.get(str(command["job_id"]))
        if job is None:
            raise InfeasibleError(f"job {command['job_id']!r}", "it is not registered", "Register")
        return job

    def _round_of(self, command: Command) -> tuple[JobState, RoundState]:
        job = self.job(command)
        if job.open is None or job.open.round_id != int(command["round_id"]):
            reason = "it is not this job's open round"
            raise InfeasibleError(
                f"round {command['round_id']}", reason, "It may be closed already"
            )
        return job, job.open

    def _index(self) -> None:
        self.matcher = TierMatcher(self.config.tiers, CLASSES, self.state.seed)
        self.matcher.load_state_dict(self.state.tiers)
        self.rounds = {
            job.open.round_id: job for job in self.state.jobs.values() if job.open is not None
        }


def _whole(command: Command, name: str, low: int, high: int) -> int:
    value = command[name]
    if not low <= value <= high or int(value) != value:
        raise ConfigError(name, value, f"a whole number in [{low}, {high}]")
    return int(value)


def _positive(command: Command, name: str) -> float:
    value = float(command[name])
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(name, value, "a positive number of seconds")
    return value


_OPERATIONS: dict[str, Callable[[SchedulerCore, Command], Reply]] = {
    "register": SchedulerCore._register,
    "open": SchedulerCore._open,
    "add": SchedulerCore._add,
    "close": SchedulerCore._close,
    "finish": SchedulerCore._finish,
    "join": join,
    "report": report,
    "tick": SchedulerCore._tick,
    "plan": make_plan,
    "lead": SchedulerCore._lead,
}
