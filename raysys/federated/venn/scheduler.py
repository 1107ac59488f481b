"""The scheduler as a deterministic state machine: command in, reply and events out.

Every command carries its time. The same commands in the same order give the same state and the same
plan, which is what the log, the standby and the replay test rest on (our design; paper, section 4.5
names only the parts). A command that is refused changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.federated.venn import baselines
from raysys.federated.venn.atoms import merge_rare
from raysys.federated.venn.credits import Grant, apportion
from raysys.federated.venn.explain import why
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.pacing import retry_after_s
from raysys.federated.venn.requests import GroupedPlan, OrderedPlan, Policy, Request
from raysys.federated.venn.requirements import Requirement
from raysys.federated.venn.scheduler_state import (
    GatewayState,
    JobState,
    RoundState,
    SchedulerState,
    ServiceConfig,
)
from raysys.federated.venn.simulator.rounds import draw_priority
from raysys.federated.venn.supply import SupplyView

Command = Mapping[str, Any]
Reply = dict[str, Any]
_SUPPLY_PATIENCE_S = 86_400.0
_IDLE_SHARE = 1e-3
_STATE = TypeAdapter(SchedulerState)

POLICIES: dict[str, Callable[[float], Policy]] = {
    "irs": lambda eps: IRS(IRSConfig(eps=eps)),
    "irs-total": lambda eps: IRS(IRSConfig(demand_scope="total", eps=eps)),
    "irs-yield": lambda eps: IRS(IRSConfig(demand_scope="total", eps=eps, yield_factor=2.0)),
    "random": lambda eps: baselines.random_per_request(),
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
    _rounds: dict[int, JobState] = field(default_factory=dict)
    _policy: Policy = field(default_factory=IRS)

    def __post_init__(self) -> None:
        if self.config.policy not in POLICIES:
            expected = "one of " + ", ".join(POLICIES)
            raise ConfigError("service.policy", self.config.policy, expected)
        self._policy = POLICIES[self.config.policy](self.config.eps)
        self.state.supply.config = self.config.supply
        self._index()

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
        self._index()

    # ------------------------------------------------------------------ jobs

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
        job = self._job(command)
        if job.open is not None and not job.open.expired:
            raise ConfigError("job_id", job.job_id, "no open round", "Close the open round first")
        demand = _whole(command, "demand", 1, self.config.max_demand)
        deadline_s = _positive(command, "deadline_s")
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
        self._rounds[job.open.round_id] = job
        state.dirty = True
        return {
            "round_id": job.open.round_id,
            "remaining": job.open.remaining,
            "warnings": self._warnings(job, demand, now_s),
        }

    def _warnings(self, job: JobState, demand: int, now_s: float) -> list[str]:
        seen = self.state.supply
        if seen.seen < self.config.supply.min_samples:
            return []
        rate = self._view(now_s).group_rates[job.group]
        started_s = now_s if seen.start_s is None else seen.start_s
        if demand > rate * _SUPPLY_PATIENCE_S:
            return ["LIKELY_UNSATISFIABLE"]
        if rate < 1e-8 and now_s - started_s > _SUPPLY_PATIENCE_S:
            return ["UNSATISFIABLE"]
        return []

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
        else:
            job.rounds_aborted += 1
        self._leave_round(job)
        return {}

    def _finish(self, command: Command) -> Reply:
        job = self._job(command)
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
        del self.state.jobs[job.job_id]
        self.events.append((job.job_id, {"kind": "GONE", "reason": reason}))

    def _leave_round(self, job: JobState) -> None:
        opened = job.open
        if opened is None:
            return
        job.assigned += opened.spent
        job.failed += opened.failed
        job.open = None
        del self._rounds[opened.round_id]
        self.state.dirty = True
        self.events.append((job.job_id, {"kind": "CLOSED", "round_id": opened.round_id}))

    # ------------------------------------------------------------------ gateways

    def _join(self, command: Command) -> Reply:
        name, incarnation = str(command["gateway"]), int(command["incarnation"])
        known = self.state.gateways.get(name)
        if known is not None and known.incarnation == incarnation:
            return {}
        if known is not None:
            self._bury(name, float(command["now"]), fence_s=0.0)
        self.state.gateways[name] = GatewayState(incarnation)
        self.state.dirty = True
        return {}

    def _report(self, command: Command) -> Reply:
        """Book usage; a repeated sequence number is booked once, a dead incarnation never."""
        name, now_s = str(command["gateway"]), float(command["now"])
        gateway = self.state.gateways.get(name)
        if gateway is None or gateway.incarnation != int(command["incarnation"]):
            raise ConfigError("gateway", name, "a joined gateway", "Call Watch again to join")
        sequence = int(command["sequence"])
        if sequence <= gateway.sequence:
            return {}
        checked = [self._checked_usage(name, usage) for usage in command["rounds"]]
        counts = {int(mask): int(count) for mask, count in command["checkins"]}
        if any(count < 0 for count in counts.values()):
            raise ConfigError("checkins", counts, "numbers >= 0")
        gateway.sequence = sequence
        gateway.recent = gateway.recent_at(now_s) + sum(counts.values())
        gateway.counted_s = now_s
        if counts:
            self.state.supply.observe(counts, now_s)
            self._notice_atoms(counts)
        for entry in checked:
            if entry is not None:
                self._book(name, *entry)
        return {}

    def _checked_usage(self, name: str, usage: Any) -> tuple[JobState, list[int]] | None:
        """A usage row after a trial booking; None when its round is over."""
        round_id, *row = (int(value) for value in usage)
        job = self._rounds.get(round_id)
        if job is None or job.open is None:
            return None
        grant = job.open.grants.get(name)
        if grant is None:
            if not any(row[:3]):
                return None
            raise ConfigError("usage.round_id", round_id, "a round this gateway has credits for")
        trial = dataclasses.replace(grant)
        trial.confirm(*row)
        return job, row

    def _book(self, name: str, job: JobState, row: list[int]) -> None:
        opened = job.open
        assert opened is not None
        grant = opened.grants[name]
        before = (grant.spent, grant.failed, grant.ceiling)
        grant.confirm(*row)
        if (grant.spent, grant.failed) != before[:2]:
            self._tell_progress(job, opened)
        if grant.failed != before[1] or grant.ceiling != before[2]:
            self.state.dirty = True

    def _tell_progress(self, job: JobState, opened: RoundState) -> None:
        filled = opened.remaining == 0
        kind = "FILLED" if filled and not opened.filled else "ASSIGNED"
        if filled != opened.filled:
            opened.filled = filled
            self.state.dirty = True
        details = {"round_id": opened.round_id, "assigned": opened.spent, "failed": opened.failed}
        self.events.append((job.job_id, {"kind": kind, **details}))

    def _notice_atoms(self, counts: Mapping[int, int]) -> None:
        new = [mask for mask in counts if mask not in self.state.masks]
        if new:
            self.state.masks = sorted([*self.state.masks, *new])
            self.state.dirty = True

    def _bury(self, name: str, now_s: float, fence_s: float) -> None:
        """A gateway died: what it may have assigned stays charged until the leases run out.

        A silent one may live behind a broken link and assign until its fence; a new incarnation
        under its name proves that it does not.
        """
        self.state.gateways.pop(name, None)
        for job in self._rounds.values():
            opened = job.open
            grant = opened.grants.pop(name, None) if opened is not None else None
            if opened is None or grant is None:
                continue
            opened.settled_spent += grant.spent
            opened.settled_failed += grant.failed
            unknown = grant.ceiling - grant.spent
            live = grant.spent - grant.done - grant.failed
            opened.lost += unknown
            back_s = now_s + self.config.report_interval_s + opened.lease_s + fence_s
            opened.returns.append((back_s, unknown, live))
        self.state.dirty = True

    # ------------------------------------------------------------------ time and plans

    def _tick(self, command: Command) -> Reply:
        """Deadlines, silent jobs, leases lost with dead gateways, and the gateways that died.

        Who is dead is the leader's finding and comes with the command, because signs of life are
        not logged.
        """
        now_s = float(command["now"])
        for name in command.get("dead", ()):
            if name in self.state.gateways:
                self._bury(name, now_s, self.config.fence_s)
        for job in list(self.state.jobs.values()):
            if self._gone(job, now_s):
                self._remove(job, "silent or too old")
            elif job.open is not None:
                self._tick_round(job, job.open, now_s)
        return {}

    def tick_due(self, now_s: float) -> bool:
        """Whether a ``tick`` at this time would change anything."""
        return any(
            self._gone(job, now_s) or (job.open is not None and _due(job.open, now_s))
            for job in self.state.jobs.values()
        )

    def _gone(self, job: JobState, now_s: float) -> bool:
        silent = now_s - job.seen_s > self.config.job_max_silent_s
        return silent or now_s - job.registered_s > self.config.job_max_life_s

    def _tick_round(self, job: JobState, opened: RoundState, now_s: float) -> None:
        due = [entry for entry in opened.returns if entry[0] <= now_s]
        if due:
            opened.returns = [entry for entry in opened.returns if entry[0] > now_s]
            for _, unknown, live in due:
                # Assigned or not, their leases are over: unknown ones go back to the demand.
                opened.lost -= unknown
                opened.settled_failed += live
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

    def _plan(self, command: Command) -> Reply:
        """Make a new plan and spread the credits."""
        now_s = float(command["now"])
        state = self.state
        view = self._view(now_s)
        requests = [self._request(job) for job in self._rounds.values() if job.open]
        waiting = [request for request in requests if request.remaining > 0]
        plan = self._policy.plan(waiting, view, now_s)
        if isinstance(plan, GroupedPlan):
            state.order = [item.job for order in plan.order.values() for item in order]
            state.atoms = [(mask, list(plan.groups(atom))) for atom, mask in enumerate(view.masks)]
            state.scarcity, state.flat = plan.scarcity, False
            state.sizes, state.yield_factor = dict(plan.sizes), plan.yield_factor
        elif isinstance(plan, OrderedPlan):
            state.order = [item.job for item in plan.order]
            state.atoms, state.scarcity, state.flat, state.sizes = [], [], True, {}
        demand = sum(request.remaining for request in waiting)
        low_s, high_s = self.config.low_retry_s, self.config.high_retry_s
        state.retry_after_s = retry_after_s(demand, sum(view.rates), low_s, high_s)
        state.version += 1
        state.dirty = False
        self._spread_credits(now_s, bool(command.get("stalled", False)))
        return {"version": state.version}

    def _spread_credits(self, now_s: float, stalled: bool) -> None:
        """Credits by share of recent check-ins; after a stall, away from who spent none."""
        names = sorted(self.state.gateways)
        if not names:
            return
        recent = [self.state.gateways[name].recent_at(now_s) for name in names]
        floor = max(sum(recent) / (50 * len(names)), 1e-9)
        weights = [max(value, floor) for value in recent]
        for job in self._rounds.values():
            opened = job.open
            if opened is None:
                continue
            grants = [opened.grants.setdefault(name, Grant()) for name in names]
            if stalled:
                for grant in grants:
                    grant.mark()
            shares = [w * _IDLE_SHARE if g.idle else w for w, g in zip(weights, grants)]
            for grant, part in zip(grants, apportion(opened.remaining, shares)):
                target = grant.spent + part
                slack = opened.allowed - (opened.charged - grant.ceiling)
                grant.set_limit(min(target, max(slack, grant.spent)))

    def explain(self, job_id: str, now_s: float) -> Reply:
        """Why a job waits; see :func:`explain.why`. Does not change the state.

        Raises:
            InfeasibleError: the job is unknown.
        """
        job = self._job({"job_id": job_id})
        about: Reply = {"job_id": job_id, "slot": job.slot, "rounds_done": job.rounds_done}
        about["requirement"] = dict(self.state.requirements[job.group].bounds)
        if job.open is None or not job.open.remaining:
            state = "no open round" if job.open is None else "expired or filled"
            return {**about, "state": state}
        waiting = [self._request(item) for item in self._rounds.values() if item.open]
        request = next(item for item in waiting if item.job == job.slot)
        view = self._view(now_s)
        plan = self._policy.plan(waiting, view, now_s)
        if isinstance(plan, GroupedPlan):
            return {**about, "state": "waiting", **why(plan, request, view).to_dict()}
        position = [item.job for item in waiting].index(job.slot)
        return {**about, "state": "waiting", "group": job.group, "position": position}

    def overview(self, now_s: float) -> Reply:
        """Jobs, groups and supply for a live view. Does not change the state."""
        view = self._view(now_s)
        jobs = []
        for job in self.state.jobs.values():
            opened = job.open
            jobs.append(
                {
                    "job": job.job_id,
                    "group": job.group,
                    "rounds_done": job.rounds_done,
                    "aborted": job.rounds_aborted,
                    "demand": opened.demand if opened else 0,
                    "remaining": opened.remaining if opened else 0,
                    "wait_s": now_s - opened.opened_s if opened else 0.0,
                }
            )
        return {
            "epoch": self.state.epoch,
            "version": self.state.version,
            "gateways": sorted(self.state.gateways),
            "checkins": self.state.supply.seen,
            "merged_atoms": self.merged_atoms,
            "groups": [
                {"requirement": dict(item.bounds), "rate": view.group_rates[group]}
                for group, item in enumerate(self.state.requirements)
            ],
            "atoms": [{"mask": mask, "rate": rate} for mask, rate in zip(view.masks, view.rates)],
            "jobs": jobs,
        }

    def rebalance_needed(self) -> bool:
        """Whether credits lie where no devices come, or freed credit is not granted again."""
        if self.state.dirty:
            return True
        for job in self._rounds.values():
            opened = job.open
            if opened is None or not opened.remaining or not opened.grants:
                continue
            left = [grant.limit - grant.spent for grant in opened.grants.values()]
            if min(left) <= 0 and (max(left) > 0 or sum(left) < opened.remaining):
                return True
        return False

    def _view(self, now_s: float) -> SupplyView:
        rates = self.state.supply.rates(self.state.masks, now_s)
        masks, rates, self.merged_atoms = merge_rare(self.state.masks, rates)
        return SupplyView.build(masks, rates, max(self._groups(), 1))

    def _groups(self) -> int:
        widest = max((mask.bit_length() for mask in self.state.masks), default=0)
        return max(widest, len(self.state.requirements))

    def _request(self, job: JobState) -> Request:
        opened = job.open
        assert opened is not None
        return Request(
            job=job.slot,
            group=job.group,
            demand=opened.demand,
            remaining=opened.remaining,
            rounds=job.rounds,
            rounds_done=job.rounds_done,
            opened_s=job.round_opened_s,
            registered_s=job.registered_s,
            priority=draw_priority(self.state.seed, job.slot, opened.round_id),
            response_s=job.response_s,
            attained=job.assigned + opened.spent,
        )

    def _job(self, command: Command) -> JobState:
        job = self.state.jobs.get(str(command["job_id"]))
        if job is None:
            raise InfeasibleError(f"job {command['job_id']!r}", "it is not registered", "Register")
        return job

    def _round_of(self, command: Command) -> tuple[JobState, RoundState]:
        job = self._job(command)
        if job.open is None or job.open.round_id != int(command["round_id"]):
            reason = "it is not this job's open round"
            raise InfeasibleError(
                f"round {command['round_id']}", reason, "It may be closed already"
            )
        return job, job.open

    def _index(self) -> None:
        self._rounds = {
            job.open.round_id: job for job in self.state.jobs.values() if job.open is not None
        }


def _due(opened: RoundState, now_s: float) -> bool:
    late = not opened.expired and now_s >= opened.opened_s + opened.deadline_s
    return late or any(entry[0] <= now_s for entry in opened.returns)


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
    "join": SchedulerCore._join,
    "report": SchedulerCore._report,
    "tick": SchedulerCore._tick,
    "plan": SchedulerCore._plan,
    "lead": SchedulerCore._lead,
}
