"""Plans, credits and explanations of the live service: functions of the scheduler core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raysys.federated.venn.atoms import merge_rare
from raysys.federated.venn.credits import Grant, apportion
from raysys.federated.venn.explain import why
from raysys.federated.venn.pacing import retry_after_s
from raysys.federated.venn.requests import GroupedPlan, OrderedPlan, Request
from raysys.federated.venn.scheduler_state import JobState
from raysys.federated.venn.simulator.rounds import draw_priority
from raysys.federated.venn.supply import TINY_RATE, SupplyView

if TYPE_CHECKING:
    from raysys.federated.venn.scheduler import SchedulerCore

Command = Mapping[str, Any]
Reply = dict[str, Any]
_IDLE_SHARE = 1e-3
SUPPLY_PATIENCE_S = 86_400.0


def make_plan(core: SchedulerCore, command: Command) -> Reply:
    """Make a new plan and spread the credits."""
    now_s = float(command["now"])
    state = core.state
    view = supply_view(core, now_s)
    requests = [_request(core, job) for job in core.rounds.values() if job.open]
    waiting = [request for request in requests if request.remaining > 0]
    plan = core.tiered().plan(waiting, view, now_s)
    for request in waiting:
        core.state_of(request.attempt).classes = request.classes
    if isinstance(plan, GroupedPlan):
        state.order = [item.job for order in plan.order.values() for item in order]
        state.atoms = [(mask, list(plan.groups(atom))) for atom, mask in enumerate(view.masks)]
        state.scarcity, state.flat = plan.scarcity, False
        state.sizes, state.yield_factor = dict(plan.sizes), plan.yield_factor
    elif isinstance(plan, OrderedPlan):
        state.order = [item.job for item in plan.order]
        state.atoms, state.scarcity, state.flat, state.sizes = [], [], True, {}
    demand = sum(request.remaining for request in waiting)
    low_s, high_s = core.config.low_retry_s, core.config.high_retry_s
    state.retry_after_s = retry_after_s(demand, sum(view.rates), low_s, high_s)
    state.version += 1
    state.dirty = False
    _spread_credits(core, now_s, bool(command.get("stalled", False)))
    _tell_hopeless(core, view, now_s)
    return {"version": state.version}


def never_seen(core: SchedulerCore, group: int, view: SupplyView, now_s: float) -> bool:
    """Whether a day of check-ins had no device for a group."""
    start_s = core.state.supply.start_s
    observed_s = 0.0 if start_s is None else now_s - start_s
    return observed_s > SUPPLY_PATIENCE_S and view.group_rates[group] <= TINY_RATE


def _tell_hopeless(core: SchedulerCore, view: SupplyView, now_s: float) -> None:
    """Tell each open round once that nobody can serve it; it stays in the plan and blocks none."""
    for job in core.rounds.values():
        opened = job.open
        if opened is None or opened.unsatisfiable or not opened.remaining:
            continue
        if never_seen(core, job.group, view, now_s):
            opened.unsatisfiable = True
            core.events.append((job.job_id, {"kind": "UNSATISFIABLE", "round_id": opened.round_id}))


def _spread_credits(core: SchedulerCore, now_s: float, stalled: bool) -> None:
    """Credits by share of recent check-ins; after a stall, away from who spent none."""
    names = sorted(core.state.gateways)
    if not names:
        return
    recent = [core.state.gateways[name].recent_at(now_s) for name in names]
    floor = max(sum(recent) / (50 * len(names)), 1e-9)
    weights = [max(value, floor) for value in recent]
    for job in core.rounds.values():
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


def explain(core: SchedulerCore, job_id: str, now_s: float) -> Reply:
    """Why a job waits; see :func:`explain.why`. Does not change the state.

    Raises:
        InfeasibleError: the job is unknown.
    """
    job = core.job({"job_id": job_id})
    about: Reply = {"job_id": job_id, "slot": job.slot, "rounds_done": job.rounds_done}
    about["requirement"] = dict(core.state.requirements[job.group].bounds)
    if job.open is None or not job.open.remaining:
        state = "no open round" if job.open is None else "expired or filled"
        return {**about, "state": state}
    waiting = [_request(core, item) for item in core.rounds.values() if item.open]
    request = next(item for item in waiting if item.job == job.slot)
    view = supply_view(core, now_s)
    plan = core.policy.plan(waiting, view, now_s)
    if isinstance(plan, GroupedPlan):
        return {**about, "state": "waiting", **why(plan, request, view).to_dict()}
    position = [item.job for item in waiting].index(job.slot)
    return {**about, "state": "waiting", "group": job.group, "position": position}


def overview(core: SchedulerCore, now_s: float) -> Reply:
    """Jobs, groups and supply for a live view. Does not change the state."""
    view = supply_view(core, now_s)
    jobs = []
    for job in core.state.jobs.values():
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
        "epoch": core.state.epoch,
        "version": core.state.version,
        "gateways": sorted(core.state.gateways),
        "checkins": core.state.supply.seen,
        "merged_atoms": core.merged_atoms,
        "groups": [
            {"requirement": dict(item.bounds), "rate": view.group_rates[group]}
            for group, item in enumerate(core.state.requirements)
        ],
        "atoms": [{"mask": mask, "rate": rate} for mask, rate in zip(view.masks, view.rates)],
        "jobs": jobs,
    }


def rebalance_needed(core: SchedulerCore) -> bool:
    """Whether credits lie where no devices come, or freed credit is not granted again."""
    if core.state.dirty:
        return True
    for job in core.rounds.values():
        opened = job.open
        if opened is None or not opened.remaining or not opened.grants:
            continue
        left = [grant.limit - grant.spent for grant in opened.grants.values()]
        if min(left) <= 0 and (max(left) > 0 or sum(left) < opened.remaining):
            return True
    return False


def supply_view(core: SchedulerCore, now_s: float) -> SupplyView:
    rates = core.state.supply.rates(core.state.masks, now_s)
    masks, rates, core.merged_atoms = merge_rare(core.state.masks, rates)
    return SupplyView.build(masks, rates, max(_groups(core), 1))


def _groups(core: SchedulerCore) -> int:
    widest = max((mask.bit_length() for mask in core.state.masks), default=0)
    return max(widest, len(core.state.requirements))


def _request(core: SchedulerCore, job: JobState) -> Request:
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
        priority=draw_priority(core.state.seed, job.slot, opened.round_id),
        response_s=job.response_s,
        classes=opened.classes,
        attempt=opened.round_id,
    )
