"""The service core as a whole: scheduler, gateways, lost messages, deaths, restarts, replay."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raysys.errors import ConfigError, DataError, RaysysError
from raysys.federated.venn.capability import capability_classes
from raysys.federated.venn.gateway import GatewayCore
from raysys.federated.venn.gateway_plan import GatewayConfig, GatewayPlan, GatewayRound
from raysys.federated.venn.scheduler import SchedulerCore
from raysys.federated.venn.scheduler_state import ServiceConfig

CONFIG = ServiceConfig(gateway_timeout_s=3.0, fence_s=5.0, job_max_silent_s=1e6)
REQUIREMENTS = ({}, {"cpu": 7.0}, {"mem": 1000.0})
VALUES = ((1.0, 10.0, 6.0), (8.0, 10.0, 6.0), (8.0, 2000.0, 6.0))
SPEEDS = (0.3, 1.0, 3.0)


def plan_for(core: SchedulerCore, gateway: str) -> GatewayPlan:
    state = core.state
    place = {slot: place for place, slot in enumerate(state.order)}
    jobs = [job for job in state.jobs.values() if job.open is not None]
    jobs.sort(key=lambda job: place.get(job.slot, len(place)))
    rounds = []
    for job in jobs:
        assert job.open is not None
        grant = job.open.grants.get(gateway)
        rounds.append(
            GatewayRound(
                job.open.round_id,
                job.slot,
                job.group,
                grant.limit if grant else 0,
                grant.version if grant else 0,
                job.open.lease_s,
                job.open.opened_s + job.open.deadline_s,
                state.sizes.get(job.slot, 0.0),
                job.open.classes,
            )
        )
    return GatewayPlan(
        epoch=state.epoch,
        version=state.version,
        schema=core.config.schema,
        requirements=tuple(state.requirements),
        rounds=tuple(rounds),
        atoms=dict(state.atoms),
        scarcity=tuple(state.scarcity),
        flat=state.flat,
        yield_factor=state.yield_factor,
        retry_after_s=state.retry_after_s,
        tiered=core.config.tiers > 1,
    )


class ServiceMachine(RuleBasedStateMachine):
    """Two gateways, any interleaving; the truth is what devices hold."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.core = SchedulerCore(CONFIG)
        self.now_s = 1000.0
        self.gateways: dict[str, GatewayCore] = {}
        self.sequence: dict[str, int] = {}
        self.incarnation = 0
        self.devices = 0
        self.open: dict[int, int] = {}  # round -> devices it may have
        self.owner: dict[int, str] = {}
        # (gateway incarnation, counter) -> (round, expiry); done: finished by a live gateway
        self.held: dict[tuple[int, int], tuple[int, float]] = {}
        self.done: dict[int, set[tuple[int, int]]] = {}

    def commit(self, **command: object) -> dict[str, object]:
        full = {**command, "now": self.now_s}
        reply = self.core.apply(full)
        self.log.append(json.dumps(full))
        return reply

    @initialize(
        policy=st.sampled_from(["irs-yield", "irs", "srsf", "fifo", "random"]),
        tiers=st.sampled_from([1, 2]),
    )
    def begin(self, policy: str, tiers: int) -> None:
        self.config = ServiceConfig(
            policy=policy, tiers=tiers, gateway_timeout_s=3.0, fence_s=5.0, job_max_silent_s=1e6
        )
        self.core = SchedulerCore(self.config)
        self.commit(op="lead")
        for index, requirement in enumerate(REQUIREMENTS):
            self.commit(op="register", job_id=f"j{index}", requirement=requirement, rounds=5)
        for name in ("a", "b"):
            self.join(name)

    def join(self, name: str) -> None:
        self.incarnation += 1
        self.commit(op="join", gateway=name, incarnation=self.incarnation)
        config = GatewayConfig(fence_s=5.0)
        self.gateways[name] = GatewayCore(name, self.incarnation, config)
        self.sequence[name] = 0
        self.deliver(name)
        self.gateways[name].heard(self.now_s)

    def deliver(self, name: str) -> None:
        self.gateways[name].adopt(plan_for(self.core, name))

    @rule(
        job=st.integers(0, 2),
        demand=st.integers(1, 30),
        lease=st.integers(5, 40),
        overcommit=st.sampled_from([1.0, 1.3]),
    )
    def open_round(self, job: int, demand: int, lease: int, overcommit: float) -> None:
        state = self.core.state.jobs[f"j{job}"]
        if state.open is not None and not state.open.expired:
            with pytest.raises(ConfigError, match="open round"):
                self.core.apply(
                    {
                        "op": "open",
                        "job_id": f"j{job}",
                        "demand": 1,
                        "deadline_s": 9,
                        "now": self.now_s,
                    }
                )
            return
        reply = self.commit(
            op="open",
            job_id=f"j{job}",
            demand=demand,
            deadline_s=100,
            lease_s=lease,
            overcommit=overcommit,
        )
        round_id = int(str(reply["round_id"]))
        self.open[round_id] = int(np.ceil(demand * overcommit - 1e-9))
        self.owner[round_id] = f"j{job}"
        self.done[round_id] = set()

    @rule(job=st.integers(0, 2), devices=st.integers(1, 5))
    def add_demand(self, job: int, devices: int) -> None:
        opened = self.core.state.jobs[f"j{job}"].open
        if opened is not None and not opened.expired:
            self.commit(op="add", job_id=f"j{job}", round_id=opened.round_id, devices=devices)
            self.open[opened.round_id] += devices

    @rule(job=st.integers(0, 2), success=st.booleans())
    def close_round(self, job: int, success: bool) -> None:
        opened = self.core.state.jobs[f"j{job}"].open
        if opened is not None:
            self.commit(
                op="close", job_id=f"j{job}", round_id=opened.round_id, success=success, answers=0
            )

    @rule(name=st.sampled_from("ab"), kinds=st.lists(st.integers(0, 2), min_size=1, max_size=25))
    def check_in(self, name: str, kinds: list[int]) -> None:
        gateway = self.gateways[name]
        numbers = range(self.devices, self.devices + len(kinds))
        self.devices += len(kinds)
        columns = np.asarray([VALUES[kind] for kind in kinds], dtype="<f4").T
        identities = b"".join(number.to_bytes(16, "big") for number in numbers)
        speeds = np.asarray([SPEEDS[kind] for kind in kinds], dtype="<f4")
        offers = gateway.check_in(
            identities,
            [column.tobytes() for column in columns],
            self.now_s,
            speeds.tobytes(),
            (1 / speeds).tobytes(),
        )
        classes = capability_classes(speeds, 1 / speeds)
        slots = {item.slot: item for item in offers.rounds.values()}
        for place, kind in enumerate(kinds):
            slot = int(offers.slots[place])
            if slot < 0:
                continue
            entry = slots[slot]
            need = REQUIREMENTS[int(self.owner[entry.round_id][1])]
            have = dict(zip(("cpu", "mem", "os"), VALUES[kind]))
            assert all(have[key] >= bound for key, bound in need.items())
            assert entry.classes >> int(classes[place]) & 1
            expiry_s = self.now_s + float(offers.expiry_s[place])
            key = (gateway.incarnation, int(offers.leases[place]))
            self.held[key] = (entry.round_id, expiry_s)

    @rule(name=st.sampled_from("ab"), share=st.floats(0, 1), outcome=st.sampled_from([0, 1, 2]))
    def release(self, name: str, share: float, outcome: int) -> None:
        gateway = self.gateways[name]
        live = [
            key
            for key, value in self.held.items()
            if key[0] == gateway.incarnation and value[1] > self.now_s
        ]
        some = live[: int(share * len(live))]
        counters = np.asarray([key[1] for key in some], dtype=np.uint64)
        accepted = gateway.release(counters, bytes([outcome] * len(some)), self.now_s)
        for key, was in zip(some, accepted):
            if was:
                round_id, _ = self.held.pop(key)
                if outcome == 0:
                    self.done[round_id].add(key)

    @rule(name=st.sampled_from("ab"), answer_lost=st.booleans(), plan_lost=st.booleans())
    def report(self, name: str, answer_lost: bool, plan_lost: bool) -> None:
        gateway = self.gateways[name]
        gateway.tick(self.now_s)
        known = self.core.state.gateways.get(name)
        if known is None or known.incarnation != gateway.incarnation:
            self.join(name)  # declared dead: it comes back as a new incarnation
            return
        usage = gateway.usage()
        self.sequence[name] += 1
        message = {
            "gateway": name,
            "incarnation": gateway.incarnation,
            "sequence": self.sequence[name],
            "rounds": usage.rounds,
            "checkins": list(usage.checkins.items()),
            "answers": [
                [round_id, [kind for kind, _ in pairs], [time_s for _, time_s in pairs]]
                for round_id, pairs in usage.answers.items()
            ],
        }
        self.commit(op="report", **message)
        before = self.core.dump()
        self.commit(op="report", **message)  # the same report again changes nothing
        assert self.core.dump() == before
        if not answer_lost:
            gateway.heard(self.now_s)
        if not plan_lost:
            self.deliver(name)

    @rule(stalled=st.booleans())
    def plan(self, stalled: bool) -> None:
        self.commit(op="plan", stalled=stalled)

    @rule(name=st.sampled_from("ab"))
    def feed(self, name: str) -> None:
        known = self.core.state.gateways.get(name)
        if known is not None and known.incarnation == self.gateways[name].incarnation:
            self.deliver(name)

    @rule(name=st.sampled_from("ab"))
    def kill_gateway(self, name: str) -> None:
        self.done_of_the_dead(name)
        self.join(name)

    @rule(name=st.sampled_from("ab"))
    def declare_dead(self, name: str) -> None:
        """Silent for too long in the leader's eyes; it may live on and assign behind the link."""
        if name in self.core.state.gateways:
            self.done_of_the_dead(name)
            self.commit(op="tick", dead=[name])

    def done_of_the_dead(self, name: str) -> None:
        """Answers that a dead gateway saw are forgotten with it: their devices count as live
        until their leases would have ended, then they are replaced."""
        incarnation = self.gateways[name].incarnation
        for finished in self.done.values():
            finished -= {key for key in finished if key[0] == incarnation}

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        if self.core.tick_due(self.now_s):
            self.commit(op="tick", dead=[])
            assert not self.core.tick_due(self.now_s)

    @rule(from_log=st.booleans())
    def restart_scheduler(self, from_log: bool) -> None:
        again = SchedulerCore(self.config)
        if from_log:
            for line in self.log:
                again.apply(json.loads(line))
        else:
            again.load(self.core.dump())
        assert again.dump() == self.core.dump()
        self.core = again
        self.commit(op="lead")

    @precondition(lambda self: bool(self.open))
    @invariant()
    def never_more_devices_than_asked_for(self) -> None:
        for round_id, allowed in self.open.items():
            live = sum(
                1 for held, end_s in self.held.values() if held == round_id and end_s > self.now_s
            )
            assert live + len(self.done[round_id]) <= allowed

    @invariant()
    def credits_never_exceed_the_demand(self) -> None:
        for job in self.core.state.jobs.values():
            if job.open is not None:
                assert job.open.charged <= job.open.allowed + job.open.settled_failed


TestServiceMachine = ServiceMachine.TestCase
TestServiceMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_refused_commands_change_nothing() -> None:
    core = SchedulerCore()
    core.apply({"op": "register", "job_id": "j", "requirement": {"cpu": 1}, "now": 0})
    before = core.dump()
    bad: list[dict[str, object]] = [
        {"op": "fly"},
        {"op": "register", "job_id": "", "requirement": {}},
        {"op": "register", "job_id": "k", "requirement": {"nose": 1}},
        {"op": "register", "job_id": "k", "requirement": {"cpu": float("inf")}},
        {"op": "register", "job_id": "j", "requirement": {"cpu": 2}},
        {"op": "open", "job_id": "x", "demand": 1, "deadline_s": 1},
        {"op": "open", "job_id": "j", "demand": 1.5, "deadline_s": 1},
        {"op": "open", "job_id": "j", "demand": 1, "deadline_s": -1},
        {"op": "close", "job_id": "j", "round_id": 7, "success": True, "answers": 0},
        {
            "op": "report",
            "gateway": "g",
            "incarnation": 1,
            "sequence": 1,
            "rounds": [],
            "checkins": [],
        },
    ]
    for command in bad:
        with pytest.raises(RaysysError):
            core.apply({**command, "now": 1})
    assert core.dump() == before


def test_damaged_snapshot_is_a_data_error() -> None:
    with pytest.raises(DataError, match="snapshot"):
        SchedulerCore().load('{"epoch": "many"}')


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"service\.policy"):
        SchedulerCore(ServiceConfig(policy="magic"))


def test_impossible_demand_is_announced_and_blocks_nobody() -> None:
    core = SchedulerCore()
    for job_id, need in (("easy", {}), ("rare", {"cpu": 99.0})):
        core.apply({"op": "register", "job_id": job_id, "requirement": need, "now": 0})
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    report = {"op": "report", "gateway": "g", "incarnation": 1, "rounds": []}
    core.apply({**report, "sequence": 1, "checkins": [[1, 500]], "now": 0})
    open_round = {"op": "open", "demand": 10, "deadline_s": 1e6}
    first = core.apply({**open_round, "job_id": "rare", "now": 3600.0})
    assert first["warnings"] == ["LIKELY_UNSATISFIABLE"]
    assert core.apply({**open_round, "job_id": "easy", "now": 3600.0})["warnings"] == []
    core.apply({**report, "sequence": 2, "checkins": [[1, 500]], "now": 90_000.0})
    core.events.clear()
    core.apply({"op": "plan", "now": 90_000.0})
    core.apply({"op": "plan", "now": 90_001.0})
    told = [event for event in core.events if event[1]["kind"] == "UNSATISFIABLE"]
    assert told == [("rare", {"kind": "UNSATISFIABLE", "round_id": first["round_id"]})]
    easy = core.state.jobs["easy"].open
    assert easy is not None
    assert easy.grants["g"].limit == 10


def test_ten_thousand_jobs_open_at_the_same_instant() -> None:
    core = SchedulerCore()
    for index in range(10_000):
        need = REQUIREMENTS[index % 3]
        job_id = f"j{index}"
        core.apply({"op": "register", "job_id": job_id, "requirement": need, "now": 0})
        core.apply({"op": "open", "job_id": job_id, "demand": 5, "deadline_s": 60, "now": 0})
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    core.apply({"op": "plan", "now": 0})
    assert len(core.state.order) == 10_000
    assert sum(job.open.grants["g"].limit for job in core.rounds.values() if job.open) == 50_000


def test_a_deadline_below_the_declared_task_is_refused() -> None:
    core = SchedulerCore()
    job = {"op": "register", "job_id": "j", "requirement": {}, "response_s": 50, "now": 0}
    core.apply(job)
    with pytest.raises(ConfigError, match="nominal"):
        core.apply({"op": "open", "job_id": "j", "demand": 5, "deadline_s": 49, "now": 0})
    assert core.apply({"op": "open", "job_id": "j", "demand": 5, "deadline_s": 50, "now": 0})
