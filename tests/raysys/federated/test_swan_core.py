"""Swan's decisions: choices, frontier, interference, controller, heat, loan, the SoC model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, StorageError
from raysys.federated.swan.choices import (
    Choice,
    ChoiceConfig,
    cost_of,
    enumerate_choices,
    greedy_choice,
)
from raysys.federated.swan.controller import PAUSE, Controller, ControllerConfig, Situation
from raysys.federated.swan.energy import (
    Battery,
    EnergyLoan,
    LoanConfig,
    counter_joules,
    gauge_watts,
)
from raysys.federated.swan.frontier import Estimate, best_index, prune
from raysys.federated.swan.heat import Heat, HeatWatch, plausible_celsius
from raysys.federated.swan.interference import Demand, Detector, Level
from raysys.federated.swan.soc import (
    MOBILENETV2,
    PHONES,
    RESNET34,
    Phone,
    load_phone,
    step_time,
)
from raysys.federated.swan.topology import Cluster, Topology, group_cores

TAB, PIXEL = PHONES[0], PHONES[4]


def equal_cores(count: int) -> Topology:
    return Topology(clusters=(Cluster(cores=tuple(range(count))),))


def estimate(seconds: float, cost: float, joules: float = 1.0) -> Estimate:
    return Estimate(
        choice=Choice((int(cost),), tuple(range(int(cost)))),
        cost=(cost,),
        seconds=seconds,
        joules=joules,
        steps=1,
    )


def test_choices_of_phones_and_hosts() -> None:
    assert len(enumerate_choices(TAB.topology())) == 11
    assert len(enumerate_choices(PIXEL.topology())) == 8
    assert len(enumerate_choices(TAB.topology(), ChoiceConfig(allow_mixed=True))) == 39
    assert greedy_choice(TAB.topology()).label(TAB.topology()) == "3 big + 1 prime"
    assert [c.threads for c in enumerate_choices(equal_cores(128))][-1] == 128
    assert len(enumerate_choices(equal_cores(128))) < 20
    limited = dataclasses.replace(equal_cores(8), quota=2.5)
    assert max(c.threads for c in enumerate_choices(limited)) == 3
    tiny = dataclasses.replace(equal_cores(4), quota=0.2)
    assert [c.threads for c in enumerate_choices(tiny)] == [1]
    reserved = enumerate_choices(TAB.topology(), ChoiceConfig(reserve_ui_core=True))
    assert all(7 not in choice.cores for choice in reserved)


def test_a_faster_core_weighs_more_than_any_number_of_slower_ones() -> None:
    topology = TAB.topology()
    ordered = [c.label(topology) for c in enumerate_choices(topology)]
    assert ordered.index("4 little") < ordered.index("1 big") < ordered.index("3 big")
    assert ordered.index("3 big") < ordered.index("1 prime")
    weighted = ChoiceConfig(cost="weighted", bandwidth=True)
    assert len(cost_of(enumerate_choices(topology)[0], topology, weighted)) == 2


def test_clusters_from_capacities_with_smt() -> None:
    pairs = [(core, 1024.0) for core in range(16)] + [(core, 614.0) for core in range(16, 24)]
    siblings = [(core, core + 1) for core in range(0, 16, 2)]
    little, big = group_cores(pairs, siblings)
    assert little.kind == "little"
    assert little.physical == 8
    assert big.cores[:8] == tuple(range(0, 16, 2))
    assert big.physical == 8
    with pytest.raises(ConfigError, match="positive capacity"):
        group_cores([(0, 0.0)])
    with pytest.raises(ConfigError, match="at least one"):
        equal_cores(2).without([0, 1])
    assert TAB.topology().without([7]).cores == tuple(range(7))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 100), st.integers(1, 30), st.floats(0.01, 100)),
        min_size=1,
        max_size=30,
    )
)
def test_frontier_rises_in_time_and_falls_in_cost(rows: list[tuple[float, int, float]]) -> None:
    items = [estimate(seconds, float(cost), joules) for seconds, cost, joules in rows]
    kept = prune(items)
    assert all(a.seconds < b.seconds and a.cost > b.cost for a, b in itertools.pairwise(kept))
    for item in items:  # nothing that was dropped beats what was kept
        assert any(k.seconds <= item.seconds and k.cost <= item.cost for k in kept)
    thrifty = prune(items, by_energy=True)
    assert thrifty[-1] == kept[-1]
    assert set(map(id, thrifty)) <= set(map(id, kept))


def test_unknown_energy_does_not_look_thrifty() -> None:
    known, unknown = estimate(1.0, 2.0, joules=2.0), estimate(1.2, 1.0, joules=math.nan)
    assert best_index([known, unknown], joule_price_s=10.0) == 0
    frugal = estimate(1.2, 1.0, joules=0.5)
    assert best_index([known, frugal], joule_price_s=10.0) == 1
    assert best_index([known, frugal]) == 0


def test_step_time_by_hand() -> None:
    greedy = greedy_choice(TAB.topology())
    r = 2419 / 2841
    by_hand = 0.35 / (r * 4 * 0.85) + 0.45 * 4 / r + 0.20 / 2 + 0.004 * 2
    assert step_time(TAB, MOBILENETV2, greedy, 1.0) == pytest.approx(by_hand)
    hot = step_time(TAB, RESNET34, greedy, 0.0, clock=[0.5] * 3)
    assert hot > 1.5 * step_time(TAB, RESNET34, greedy, 0.0)
    busy = step_time(TAB, RESNET34, greedy, 0.0, stolen=[0, 0.5, 0], stolen_bandwidth=0.5)
    assert busy > 1.5 * step_time(TAB, RESNET34, greedy, 0.0)


def test_detector_tells_mild_from_severe_and_heat_from_the_owner() -> None:
    detector = Detector()
    assert [detector.step(1.3, 1.0) for _ in range(3)] == [Level.NONE, Level.NONE, Level.MILD]
    assert detector.step(2.6, 1.0) == Level.SEVERE
    detector.moved()
    assert [detector.step(1.3, 1.0, clock=0.75) for _ in range(5)] == [Level.NONE] * 5
    choice = Choice((1,), (0,))
    busy = Demand(shares={0: 0.5, 1: 0.0})
    assert detector.sample(0.0, busy, choice) == Level.NONE
    assert detector.sample(0.6, busy, choice) == Level.MILD
    assert not detector.quiet_on(choice)
    assert detector.quiet_on(Choice((1,), (1,)))
    hopping = Demand(shares={0: 0.2, 1: 0.2})
    assert hopping.on(Choice((2,), (0, 1))) == pytest.approx(0.34)
    assert Demand(shares={0: 0.03, 1: 0.03}).on(Choice((2,), (0, 1))) == pytest.approx(0.03)
    assert detector.sample(0.9, Demand(), choice) == Level.NONE
    assert detector.sample(1.0, Demand(owner_active=True), choice) == Level.NONE
    assert detector.sample(1.6, Demand(owner_active=True), choice) == Level.MILD


def three_places(config: ControllerConfig | None = None) -> Controller:
    controller = Controller(config)
    frontier = [estimate(1, 3), estimate(2, 2), estimate(4, 1)]
    controller.adopt(frontier, 0, 0.0)
    return controller


def test_controller_yields_at_once_and_returns_with_patience() -> None:
    controller = three_places()
    move = controller.decide(100.0, Situation(level=Level.SEVERE))
    assert move is not None
    assert (move.target, move.reason) == (2, "severe interference")
    assert controller.decide(105.0, Situation()) is None
    back = controller.decide(111.0, Situation())
    assert back is not None
    assert back.target == 1
    assert controller.decide(112.0, Situation(level=Level.MILD)) is None, "least dwell"
    again = controller.decide(113.5, Situation(level=Level.MILD))
    assert again is not None
    assert controller.hold_s == 20.0, "an undone upgrade doubles the patience"
    assert controller.decide(800.0, Situation(quiet_above=False)) is None
    assert controller.hold_s == 10.0, "ten quiet minutes reset it"


def test_no_oscillation_under_interference_with_the_period_of_hold() -> None:
    controller = three_places()
    moves = 0
    for tick in range(4 * 3600):
        now_s = tick * 0.25
        noisy = now_s % 11.0 < 1.0
        level = Level.MILD if noisy else Level.NONE
        moves += controller.decide(now_s, Situation(level=level)) is not None
    assert moves < 60


def test_endless_interference_ends_in_a_pause_and_not_in_a_spin() -> None:
    controller = three_places()
    for tick in range(400):
        controller.decide(tick * 0.25, Situation(level=Level.MILD))
    assert controller.place == PAUSE
    assert controller.moves == 3
    resumed = [controller.decide(100 + tick * 0.25, Situation()) for tick in range(60)]
    assert any(move is not None and move.target == 2 for move in resumed)


def test_limits_rule() -> None:
    controller = three_places()
    hot = controller.decide(10.0, Situation(heat=Heat.HOT))
    assert hot is not None
    assert hot.target == 1
    assert controller.decide(11.0, Situation(heat=Heat.HOT)) is None, "every five seconds"
    assert controller.decide(16.0, Situation(heat=Heat.HOT, rising=False)) is None
    critical = controller.decide(17.0, Situation(heat=Heat.CRITICAL))
    assert critical is not None
    assert critical.target == PAUSE
    assert controller.decide(60.0, Situation(refusal="battery")) is None
    assert controller.decide(90.0, Situation(heat=Heat.HOT)) is None
    priced = three_places()
    move = priced.decide(10.0, Situation(best=2))
    assert move is not None
    assert move.target == 2
    assert priced.decide(60.0, Situation(best=2)) is None, "no upgrade past the price"


def test_heat_readings() -> None:
    assert plausible_celsius([41_500.0, 255_000.0, 0.0, -3.0]) == 41.5
    assert plausible_celsius([38.0]) == 38.0
    assert math.isnan(plausible_celsius([0.0, 255.0]))
    watch = HeatWatch()
    states = [watch.read(c) for c in (39.0, 40.5, 39.5, 43.1, math.nan, 45.0, 44.5, 30.0)]
    names = ["COOL", "WARM", "WARM", "HOT", "HOT", "CRITICAL", "CRITICAL", "COOL"]
    assert [state.name for state in states] == names


def test_loan_is_spent_repaid_and_refuses() -> None:
    loan = EnergyLoan(10.0, LoanConfig())
    away, plugged = Battery(level=0.8, external=False), Battery(level=0.95, external=True)
    assert loan.allowance_j == 3600.0
    loan.spend(0.0, 1800.0, away)
    loan.spend(0.0, 1800.0, plugged)
    loan.spend(0.0, math.nan, away)
    loan.spend(0.0, -5.0, away)
    assert loan.loan_j == 1800.0
    assert loan.used == 0.5
    assert loan.joule_price_s(4.0, 8.0, away) == 0.25
    assert loan.joule_price_s(4.0, 8.0, plugged) == 0.0
    loan.spend(0.0, 1900.0, away)
    assert "used up" in loan.refusal(0.0, away)
    assert loan.refusal(0.0, plugged) == ""
    loan.repay(10_000.0, Battery(level=0.5, external=True))
    assert loan.loan_j == 3700.0, "only a full battery repays"
    loan.repay(10_000.0, plugged)
    assert loan.loan_j == 0.0
    low = Battery(level=0.25, external=False)
    assert "floor" in loan.refusal(0.0, low)
    drained = Battery(level=0.5, external=False, drain_w=1.0)
    assert "last the day" in loan.refusal(0.0, drained)
    other = EnergyLoan(10.0)
    other.load(loan.state())
    assert other.borrowed_j == loan.borrowed_j


def test_counters_with_faults() -> None:
    assert counter_joules(900_000, 100_000, 1_000_000) == pytest.approx(0.2)
    assert math.isnan(counter_joules(900_000, 100_000, 0))
    assert math.isnan(counter_joules(-1, 100, 1000))
    assert math.isnan(counter_joules(0, 2000, 1000))
    assert gauge_watts(-500_000, 3_850_000) == pytest.approx(1.925)
    assert gauge_watts(500, 3850) == pytest.approx(1.925)
    assert math.isnan(gauge_watts(0, 3_850_000))
    assert math.isnan(gauge_watts(500, 0))


def test_any_phone_from_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "phone.json"
    cores = [{"count": 4, "max_mhz": 2000, "power": 150}, {"count": 2, "max_mhz": 3000}]
    path.write_text(json.dumps({"name": "mine", "soc": "s", "cores": cores, "latency_ms": 22}))
    phone = load_phone(path)
    assert isinstance(phone, Phone)
    assert phone.rate == 2.0
    assert [c.kind for c in phone.topology().clusters] == ["little", "big"]
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_phone(path)
    path.write_text('{"name": "x", "soc": "y", "cores": [{"count": 0, "max_mhz": 1}]}')
    with pytest.raises(ConfigError, match="count"):
        load_phone(path)
    with pytest.raises(StorageError):
        load_phone(tmp_path / "absent")
