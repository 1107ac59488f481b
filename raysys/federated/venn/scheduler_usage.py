"""What gateways report, and what happens when one dies: functions of the scheduler core."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raysys.errors import ConfigError
from raysys.federated.venn.scheduler_state import GatewayState, JobState, LostGrant, RoundState

if TYPE_CHECKING:
    from raysys.federated.venn.scheduler import SchedulerCore

Command = Mapping[str, Any]
Reply = dict[str, Any]
KEPT_ANSWERS = 512


def join(core: SchedulerCore, command: Command) -> Reply:
    name, incarnation = str(command["gateway"]), int(command["incarnation"])
    known = core.state.gateways.get(name)
    if known is not None and known.incarnation == incarnation:
        return {}
    now_s = float(command["now"])
    if known is not None:
        bury(core, name, now_s, fence_s=0.0)
    _lift_fences(core, name, now_s)
    core.state.gateways[name] = GatewayState(incarnation)
    core.state.dirty = True
    return {}


def report(core: SchedulerCore, command: Command) -> Reply:
    """Book usage; a repeated sequence number is booked once, a dead incarnation never."""
    name, now_s = str(command["gateway"]), float(command["now"])
    gateway = core.state.gateways.get(name)
    if gateway is None or gateway.incarnation != int(command["incarnation"]):
        raise ConfigError("gateway", name, "a joined gateway", "Call Watch again to join")
    sequence = int(command["sequence"])
    if sequence <= gateway.sequence:
        return {}
    reported = [int(usage[0]) for usage in command["rounds"]]
    if len(set(reported)) != len(reported):
        raise ConfigError("usage.round_id", reported, "every round once")
    checked = [_checked(core, name, usage) for usage in command["rounds"]]
    counts = {int(mask): int(count) for mask, count in command["checkins"]}
    if any(count < 0 for count in counts.values()):
        raise ConfigError("checkins", counts, "numbers >= 0")
    groups = len(core.state.requirements)
    if any(mask >> groups for mask in counts):
        raise ConfigError("checkins.mask", max(counts), f"bits of the {groups} known groups")
    gateway.sequence = sequence
    for round_id, kinds, times in command.get("answers", ()):
        _profile(core, int(round_id), kinds, times)
    gateway.recent = gateway.recent_at(now_s) + sum(counts.values())
    gateway.counted_s = now_s
    if counts:
        core.state.supply.observe(counts, now_s)
        _notice_atoms(core, counts)
    for entry in checked:
        if entry is not None:
            _book(core, name, *entry, now_s)
    return {}


def _profile(core: SchedulerCore, round_id: int, kinds: Any, times: Any) -> None:
    """Keep class and response time of finished devices until the round closes."""
    job = core.rounds.get(round_id)
    if job is not None and job.open is not None and core.matcher.tiers > 1:
        room = KEPT_ANSWERS - len(job.open.answers)
        pairs = [(int(kind), float(time_s)) for kind, time_s in zip(kinds, times)]
        job.open.answers += pairs[: max(room, 0)]


def _checked(core: SchedulerCore, name: str, usage: Any) -> tuple[JobState, list[int]] | None:
    """A usage row after a trial booking; None when its round is over."""
    round_id, *row = (int(value) for value in usage)
    job = core.rounds.get(round_id)
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


def _book(core: SchedulerCore, name: str, job: JobState, row: list[int], now_s: float) -> None:
    opened = job.open
    assert opened is not None
    grant = opened.grants[name]
    before = (grant.spent, grant.failed, grant.ceiling)
    grant.confirm(*row)
    if (grant.spent, grant.failed) != before[:2]:
        _tell_progress(core, job, opened, now_s)
    if grant.failed != before[1] or grant.ceiling != before[2]:
        core.state.dirty = True


def _tell_progress(core: SchedulerCore, job: JobState, opened: RoundState, now_s: float) -> None:
    filled = opened.remaining == 0
    kind = "FILLED" if filled and not opened.filled else "ASSIGNED"
    if filled != opened.filled:
        opened.filled = filled
        opened.filled_s = opened.filled_s or now_s
        core.state.dirty = True
    details = {"round_id": opened.round_id, "assigned": opened.spent, "failed": opened.failed}
    core.events.append((job.job_id, {"kind": kind, **details}))


def _notice_atoms(core: SchedulerCore, counts: Mapping[int, int]) -> None:
    known = set(core.state.masks)
    new = [mask for mask in counts if mask not in known]
    if new:
        core.state.masks = sorted([*core.state.masks, *new])
        core.state.dirty = True


def bury(core: SchedulerCore, name: str, now_s: float, fence_s: float) -> None:
    """A gateway died: what it may have assigned stays charged until the leases run out.

    A silent one may live behind a broken link and assign until its fence; a new incarnation
    under its name proves that it does not.
    """
    core.state.gateways.pop(name, None)
    for job in core.rounds.values():
        opened = job.open
        grant = opened.grants.pop(name, None) if opened is not None else None
        if opened is None or grant is None:
            continue
        opened.settled_spent += grant.spent
        opened.settled_failed += grant.failed
        unknown = grant.ceiling - grant.spent
        live = grant.spent - grant.done - grant.failed
        opened.lost += unknown
        back_s = now_s + core.config.report_interval_s + opened.lease_s + fence_s
        opened.returns.append(LostGrant(name, back_s, unknown, live))
    core.state.dirty = True


def _lift_fences(core: SchedulerCore, name: str, now_s: float) -> None:
    """A new incarnation proves that the old one has stopped: its last leases started by now."""
    for job in core.rounds.values():
        if job.open is not None:
            latest_s = now_s + core.config.report_interval_s + job.open.lease_s
            for entry in job.open.returns:
                if entry.gateway == name:
                    entry.back_s = min(entry.back_s, latest_s)
