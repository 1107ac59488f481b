"""Swan's pilot: exploration, shared profiles, giving way, days of a simulated phone."""

from __future__ import annotations

import dataclasses
import math

import pytest

from raysys.errors import ConfigError
from raysys.federated.swan.interference import Demand
from raysys.federated.swan.pilot import Pilot, Policy, Step
from raysys.federated.swan.profile import check_plain
from raysys.federated.swan.sharing import ProfileBook
from raysys.federated.swan.simulation import SimulatedPhone, Surroundings
from raysys.federated.swan.soc import (
    BETAS,
    PHONES,
    SHUFFLENETV2,
    WORKLOADS,
)
from raysys.federated.swan.topology import Cluster, Topology

TAB, PIXEL = PHONES[0], PHONES[4]


def equal_cores(count: int) -> Topology:
    return Topology(clusters=(Cluster(cores=tuple(range(count))),))


@pytest.mark.parametrize("beta", BETAS)
def test_exploration_finds_the_best_at_little_cost(beta: float) -> None:
    for workload in WORKLOADS:
        cool = dataclasses.replace(PIXEL, heat_j_per_k=1e9)
        phone = SimulatedPhone(cool, workload, beta, Policy(), seed=3)
        best_s = phone.expected_s(phone.oracle())
        excess_s = 0.0
        while phone.pilot.exploring:
            assert phone.pilot.choice is not None
            excess_s += phone.expected_s(phone.pilot.choice) - best_s
            phone.step()
            assert phone.totals.steps < 100
        assert phone.pilot.choice is not None
        assert phone.expected_s(phone.pilot.choice) < 1.05 * best_s
        assert excess_s < 0.1 * 200 * best_s


def test_exploration_of_unmeasured_choices_and_bad_steps() -> None:
    pilot = Pilot(equal_cores(2))
    for number in range(2):
        pilot.on_step(float(number), Step(seconds=1.0))
    with pytest.raises(ConfigError, match="positive finite"):
        pilot.on_step(2.0, Step(seconds=0.0))
    lone = Pilot(equal_cores(1))
    for number in range(20):
        lone.on_step(float(number), Step(seconds=1.0))
    assert not lone.exploring
    assert lone.status()["frontier"] == ["1 big", "pause"]


def test_slow_first_step_is_warm_up() -> None:
    pilot = Pilot(equal_cores(2))
    now_s = 0.0
    for number in range(60):
        threads = pilot.choice.threads if pilot.choice else 1
        seconds = 10.0 if number == 0 else 1.0 / threads
        now_s += seconds
        pilot.on_step(now_s, Step(seconds=seconds))
    assert not pilot.exploring
    assert pilot.choice is not None
    assert pilot.choice.threads == 2


def profile_of(seconds: float) -> dict[str, object]:
    rows = [{"counts": [1], "seconds": seconds}, {"counts": [2], "seconds": seconds / 2}]
    return {"schema": 1, "device": "x", "choices": rows}


def test_sharing_wants_a_quorum_and_ignores_poison() -> None:
    book = ProfileBook()
    book.add(0.0, "x|k", "a", profile_of(1.0))
    book.add(0.0, "x|k", "a", profile_of(1.0))
    book.add(0.0, "x|k", "b", profile_of(1.05))
    assert book.consensus(1.0, "x|k", "x") is None, "two contributors are no quorum"
    book.add(0.0, "x|k", "poison", profile_of(1000.0))
    assert book.consensus(1.0, "x|k", "x") is None, "nor with a liar"
    book.add(0.0, "x|k", "c", profile_of(0.95))
    agreed = book.consensus(1.0, "x|k", "x")
    assert agreed is not None
    assert agreed["choices"][0]["seconds"] == 1.0
    assert book.consensus(31 * 86_400.0, "x|k", "x") is None, "it expires"
    for device in ("d", "e", "f"):
        book.strike("x|k", device)
    assert book.consensus(1.0, "x|k", "x") is None, "three deviations drop it"


@pytest.mark.parametrize(
    "plain",
    [
        {"schema": 2, "choices": []},
        {"schema": 1, "choices": []},
        {"schema": 1, "choices": [{"counts": [1], "seconds": -1}]},
        {"schema": 1, "choices": [{"counts": [1], "seconds": math.inf}]},
        {"schema": 1, "choices": [{"counts": ["1"], "seconds": 1}]},
        {"schema": 1, "choices": [{"counts": [1], "seconds": True}]},
        {"schema": 1, "choices": ["?"]},
    ],
)
def test_malformed_profiles_are_refused(plain: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ProfileBook().add(0.0, "k", "a", plain)


def test_shared_profile_is_verified_before_it_is_trusted() -> None:
    shared = {**profile_of(1.0), "device": "unknown"}
    for truth, trusted in ((1.0, True), (3.0, False)):
        pilot = Pilot(equal_cores(2), shared=shared)
        now_s = 0.0
        while pilot.exploring:
            assert pilot.choice is not None
            now_s += truth / pilot.choice.threads
            pilot.on_step(now_s, Step(seconds=truth / pilot.choice.threads))
        assert pilot.verified is trusted
        assert pilot.choice is not None
        assert pilot.choice.threads == 2
        assert (pilot.exploration_steps == 12) is trusted
    own = Pilot(equal_cores(2), shared=shared, trusted=True)
    assert not own.exploring
    assert own.choice is not None
    assert own.choice.threads == 2
    with pytest.raises(ConfigError, match="choices that this device has"):
        Pilot(PIXEL.topology(), shared=profile_of(1.0))
    with pytest.raises(ConfigError, match="Another processor"):
        check_plain(profile_of(1.0), "y")


def test_pilot_swaps_its_core_for_a_quiet_one() -> None:
    pilot = Pilot(equal_cores(2))
    now_s = 0.0
    while pilot.exploring:
        assert pilot.choice is not None
        seconds = 1.0 * pilot.choice.threads  # more threads hurt here
        now_s += seconds
        pilot.on_step(now_s, Step(seconds=seconds))
    assert pilot.choice is not None
    assert pilot.choice.cores == (0,)
    owner = Demand(shares={0: 0.8, 1: 0.0})
    changes = [pilot.on_sample(now_s + t, owner) for t in (0.0, 0.3, 0.6)]
    assert [change is not None for change in changes] == [False, False, True]
    assert pilot.choice.cores == (1,)
    assert pilot.controller.moves == 0, "it cost no place on the frontier"


def test_choices_that_fail_are_left_at_once() -> None:
    pilot = Pilot(equal_cores(2))
    assert pilot.choice is not None
    change = pilot.drop(pilot.choice, "refused", 0.0)
    assert change is not None
    assert change.choice is not None
    assert change.choice.threads == 2
    for number in range(30):
        pilot.on_step(float(number), Step(seconds=1.0))
    assert [item.choice.threads for item in pilot.frontier] == [2]


def test_half_a_day_keeps_every_limit() -> None:
    def owner(now_s: float) -> list[float]:
        return [0.6, 0.6] if now_s % 1200 < 300 else [0.0, 0.0]

    charging = Surroundings(owner=owner, charging_w=lambda now_s: 10.0 if now_s < 7200 else 0.0)
    phone = SimulatedPhone(
        PIXEL, SHUFFLENETV2, 4.0, Policy(), surroundings=charging, unit_s=20.0, sample_s=10.0,
        battery=True,
    )  # fmt: skip
    totals = phone.run(until_s=6 * 3600.0)
    assert totals.steps == phone.pilot.steps
    assert totals.hottest_c < 45
    assert totals.largest_loan < phone.pilot.loan.allowance_j + 100
    assert len(totals.moves) < 6 * 60
