"""A gateway against the scheduler's core, plans and speeds as they travel: tiers, odd devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actors.proto.messages import pb
from actors.venn import wire
from raysys.errors import ConfigError
from raysys.federated.venn.capability import UNKNOWN, capability_classes
from raysys.federated.venn.gateway import DONE, GatewayCore
from raysys.federated.venn.gateway_plan import GatewayPlan
from raysys.federated.venn.scheduler import SchedulerCore
from raysys.federated.venn.scheduler_state import ServiceConfig

PHONE = (8.0, 2000.0, 6.0)


def plan_for(core: SchedulerCore, gateway: str, now_s: float = 0.0) -> GatewayPlan:
    """The plan as the gateway reads it off the wire."""
    return wire.plan_from_message(wire.plan_message(core, gateway, now_s), now_s)


class Tiered:
    """One gateway, one job with two kinds of phones; whoever checks in answers in its own time."""

    def __init__(self) -> None:
        self.core = SchedulerCore(ServiceConfig(tiers=2, fence_s=1e9))
        self.gateway = GatewayCore("g", 1)
        self.now_s, self.device, self.sequence = 0.0, 0, 0
        self.apply(op="register", job_id="j", requirement={}, rounds=100)
        self.apply(op="register", job_id="next", requirement={}, rounds=10**6)
        self.apply(op="join", gateway="g", incarnation=1)

    def apply(self, **command: object) -> dict[str, object]:
        return self.core.apply({**command, "now": self.now_s})

    def deliver(self) -> None:
        self.apply(op="plan")
        self.gateway.adopt(plan_for(self.core, "g", self.now_s))
        self.gateway.heard(self.now_s)

    def check_in(self, speeds: list[float] | None, count: int = 40) -> npt.NDArray[np.int32]:
        numbers = range(self.device, self.device + count)
        self.device += count
        columns = [np.full(count, value, dtype="<f4").tobytes() for value in PHONE]
        told = np.asarray(speeds or [], dtype="<f4")
        offers = self.gateway.check_in(
            b"".join(number.to_bytes(16, "big") for number in numbers),
            columns,
            self.now_s,
            told.tobytes(),
            (1 / told).tobytes(),
        )
        self.leases, self.speeds = offers.leases, told
        return offers.slots

    def report(self) -> None:
        usage = self.gateway.usage()
        self.sequence += 1
        answers = [
            [key, [kind for kind, _ in rows], [time_s for _, time_s in rows]]
            for key, rows in usage.answers.items()
        ]
        self.apply(
            op="report",
            gateway="g",
            incarnation=1,
            sequence=self.sequence,
            rounds=usage.rounds,
            checkins=list(usage.checkins.items()),
            answers=answers,
        )

    def round(self) -> None:
        """Open, fill in a second, answer after 20 s (fast) and 200 s (slow), close."""
        ticket = self.apply(op="open", job_id="j", demand=40, deadline_s=600)
        self.deliver()
        self.now_s += 1.0
        self.check_in([0.3, 3.0] * 20)
        self.report()
        for speed, wait_s in ((0.3, 19.0), (3.0, 180.0)):
            self.now_s += wait_s
            done = (self.leases > 0) & np.isclose(self.speeds, speed)
            self.gateway.release(self.leases[done], bytes(int(done.sum()) * [DONE]), self.now_s)
        self.report()
        self.apply(op="close", job_id="j", round_id=ticket["round_id"], success=True, answers=40)


def test_live_tier_matching_learns_restricts_and_survives_a_snapshot() -> None:
    live = Tiered()
    live.round()
    live.round()
    restricted, already = 0, live.core.matcher.restricted
    for _ in range(12):
        ticket = live.apply(op="open", job_id="j", demand=10, deadline_s=600)
        live.apply(op="open", job_id="next", demand=1000, deadline_s=600)
        live.deliver()
        opened = live.core.state_of(int(str(ticket["round_id"])))
        again = SchedulerCore(live.core.config)
        again.load(live.core.dump())
        assert again.dump() == live.core.dump()
        assert again.matcher.restricted == live.core.matcher.restricted
        slots = live.check_in([0.3, 3.0] * 20)
        assert (slots >= 0).all()  # the next job takes what a restricted round leaves
        if opened.classes != -1:
            restricted += 1
            mine = live.speeds[slots == 0]
            assert len(set(mine.tolist())) == 1
            assert live.check_in(None, count=3).tolist() == [1, 1, 1]  # speed unknown: not for it
        for job_id in ("j", "next"):
            round_id = live.core.state.jobs[job_id].open.round_id  # type: ignore[union-attr]
            live.apply(op="close", job_id=job_id, round_id=round_id, success=False, answers=0)
    assert 0 < restricted < 12  # the slow tier gains nothing, and is drawn half of the time
    assert live.core.matcher.restricted == already + restricted


def test_bad_speeds_are_refused_and_unknown_ones_are_a_class() -> None:
    live = Tiered()
    live.deliver()
    for speeds in ([1.0], [0.0] * 4, [float("nan")] * 4):
        with np.errstate(divide="ignore"), pytest.raises(ConfigError, match="compute"):
            live.check_in(speeds, count=4)
    assert capability_classes(np.full(1, 1e-6), np.full(1, 1e6)).tolist() == [0]
    assert capability_classes(np.full(1, 1e6), np.full(1, 1e-6)).tolist() == [UNKNOWN - 1]


def columns_of(values: tuple[float, ...], count: int) -> list[bytes]:
    return [np.full(count, value, dtype="<f4").tobytes() for value in values]


def test_changed_attributes_keep_the_lease_and_count_as_the_new_kind() -> None:
    core, gateway = SchedulerCore(), GatewayCore("g", 1)
    core.apply({"op": "register", "job_id": "fast", "requirement": {"cpu": 7.0}, "now": 0})
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    core.apply({"op": "open", "job_id": "fast", "demand": 2, "deadline_s": 60, "now": 0})
    core.apply({"op": "plan", "now": 0})
    gateway.adopt(plan_for(core, "g"))
    gateway.heard(0.0)
    first = gateway.check_in(bytes(16), columns_of((9.0, 10.0, 6.0), 1), 1.0)
    again = gateway.check_in(bytes(16), columns_of((1.0, 10.0, 6.0), 1), 2.0)
    assert first.leases[0] == again.leases[0] > 0
    assert again.expiry_s[0] == first.expiry_s[0] - 1.0
    assert gateway.usage().checkins == {1: 1, 0: 1}
    other = (1).to_bytes(16, "big")
    assert gateway.check_in(other, columns_of((1.0, 10.0, 6.0), 1), 3.0).slots.tolist() == [-1]


def test_devices_that_suit_nobody_are_sent_away_and_stall_nobody() -> None:
    core, gateway = SchedulerCore(), GatewayCore("g", 1)
    for job_id in ("a", "b"):
        core.apply({"op": "register", "job_id": job_id, "requirement": {"cpu": 7.0}, "now": 0})
        core.apply({"op": "open", "job_id": job_id, "demand": 2, "deadline_s": 60, "now": 0})
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    report = {"op": "report", "gateway": "g", "incarnation": 1, "rounds": []}
    core.apply({**report, "sequence": 1, "checkins": [[0, 500]], "now": 0})
    core.apply({"op": "plan", "now": 1})
    gateway.adopt(plan_for(core, "g", 1.0))
    gateway.heard(1.0)
    identities = b"".join(number.to_bytes(16, "big") for number in range(50))
    offers = gateway.check_in(identities, columns_of((1.0, 10.0, 6.0), 50), 1.0)
    assert (offers.slots == -1).all()
    assert (offers.retry_s > 0).all()
    fitting = gateway.check_in((99).to_bytes(16, "big"), columns_of((9.0, 10.0, 6.0), 1), 1.0)
    assert fitting.slots.tolist() == [0]


def test_a_round_past_its_end_gives_nothing_and_the_next_one_does() -> None:
    core, gateway = SchedulerCore(), GatewayCore("g", 1)
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    for job_id, deadline_s in (("short", 10), ("long", 1000)):
        core.apply({"op": "register", "job_id": job_id, "requirement": {}, "now": 0})
        core.apply(
            {"op": "open", "job_id": job_id, "demand": 5, "deadline_s": deadline_s, "now": 0}
        )
    core.apply({"op": "plan", "now": 0})
    gateway.adopt(plan_for(core, "g"))
    gateway.heard(0.0)

    def one(number: int, now_s: float) -> int:
        gateway.heard(now_s)
        values = columns_of((1.0, 10.0, 6.0), 1)
        return int(gateway.check_in(number.to_bytes(16, "big"), values, now_s).slots[0])

    assert one(1, 5.0) == 0
    assert [one(number, 11.0) for number in range(2, 8)] == [1, 1, 1, 1, 1, -1]


def test_a_new_incarnation_lifts_the_fence_of_a_silent_gateway() -> None:
    core = SchedulerCore(ServiceConfig(fence_s=100.0, report_interval_s=0.1))
    core.apply({"op": "register", "job_id": "j", "requirement": {}, "now": 0})
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    core.apply(
        {"op": "open", "job_id": "j", "demand": 5, "deadline_s": 600, "lease_s": 3, "now": 0}
    )
    core.apply({"op": "plan", "now": 0})
    core.apply({"op": "tick", "dead": ["g"], "now": 10.0})
    opened = core.state.jobs["j"].open
    assert opened is not None
    assert (opened.remaining, opened.returns[0].back_s) == (0, 113.1)
    core.apply({"op": "join", "gateway": "other", "incarnation": 1, "now": 11.0})
    assert opened.returns[0].back_s == 113.1
    core.apply({"op": "join", "gateway": "g", "incarnation": 2, "now": 12.0})
    assert opened.returns[0].back_s == 15.1
    core.apply({"op": "tick", "dead": [], "now": 15.2})
    assert opened.remaining == 5


def test_a_job_that_registers_again_moves_its_endpoint() -> None:
    core = SchedulerCore()
    first = {"op": "register", "job_id": "j", "requirement": {}, "rounds": 9, "now": 0}
    core.apply({**first, "upload_endpoint": "old:1/x", "plan_uri": "p"})
    core.apply({"op": "join", "gateway": "g", "incarnation": 1, "now": 0})
    core.apply({"op": "open", "job_id": "j", "demand": 1, "deadline_s": 60, "now": 0})
    core.apply({"op": "plan", "now": 0})
    assert not core.state.dirty
    again = {"op": "register", "job_id": "j", "requirement": {}, "now": 1}
    assert core.apply({**again, "upload_endpoint": "new:2/y"}) == {"slot": 0}
    assert core.state.dirty
    core.apply({"op": "plan", "now": 1})
    task: Any = plan_for(core, "g", 1.0).rounds[0].task
    assert (task.upload_endpoint, task.plan_uri) == ("new:2/y", "p")
    assert core.state.jobs["j"].rounds == 9


@pytest.mark.parametrize(
    ("classes", "times", "field"),
    [
        (b"\x01", b"", "response_s"),
        (b"\x0c", np.float32(1).tobytes(), "classes"),
        (b"\x01", np.float32("nan").tobytes(), "response_s"),
        (b"\x01", np.float32(-1).tobytes(), "response_s"),
    ],
)
def test_malformed_answers_of_a_gateway_are_refused(
    classes: bytes, times: bytes, field: str
) -> None:
    report = pb.UsageReport()
    report.answers.add(round_id=1, classes=classes, response_s=times)
    with pytest.raises(ConfigError, match=field):
        wire.answers_of(report)
    good = pb.UsageReport()
    good.answers.add(round_id=1, classes=b"\x0b", response_s=np.float32(2.5).tobytes())
    assert wire.answers_of(good) == [[1, [11], [2.5]]]
