"""A population that several jobs share: nobody works twice at once, nothing is counted twice."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysys.compose.phones import DAY_S, Phones
from raysys.compose.shared_fleet import FleetJob, SharedFleetConfig, masks_of, run_shared
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.swan.fleet import FleetDevice, draw_fleet
from raysys.federated.swan.soc import MOBILENETV2
from raysys.federated.venn.baselines import random_per_request
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy

COUNT = 60
VENN = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))


def fleet(use: str = "swan", seed: int = 3) -> list[FleetDevice]:
    return draw_fleet(COUNT, MOBILENETV2, 1.0, use, 2.0, seed)


def jobs(rounds: int = 4) -> list[FleetJob]:
    return [
        FleetJob(name="any", group=0, participants=8, rounds=rounds),
        FleetJob(name="strong", group=1, participants=8, rounds=rounds, arrival_s=600.0),
    ]


class Witness(Phones):
    """Notes every task, to check what the engine does."""

    def __init__(self, use: str = "swan") -> None:
        super().__init__(fleet(use), 0.3, 20.0, 5)
        self.spent: list[tuple[int, float]] = []

    def spend(self, phone: int, joules: float, now_s: float) -> None:
        assert self.left_s(phone, now_s - 1.0) > 0.0 or joules >= 0.0
        self.spent.append((phone, joules))
        super().spend(phone, joules, now_s)


def play(policy: Policy, use: str = "swan"):  # type: ignore[no-untyped-def]
    phones = Witness(use)
    scores = np.array([device.cpu_score for device in phones.devices])
    masks = masks_of(scores, (0.0, float(np.median(scores))))
    rounds: list[list[np.ndarray]] = [[], []]

    def learner(index: int):  # type: ignore[no-untyped-def]
        def learn(round_id: int, devices: np.ndarray) -> None:
            assert round_id == len(rounds[index])
            rounds[index].append(devices)

        return learn

    found = run_shared(phones, masks, jobs(), policy, [learner(0), learner(1)])
    return found, rounds, phones, masks


@pytest.mark.parametrize("policy", [VENN, random_per_request()], ids=["venn", "random"])
def test_rounds_close_with_enough_phones_that_meet_the_requirement(policy: Policy) -> None:
    found, rounds, phones, masks = play(policy)
    for index, (outcome, closed) in enumerate(zip(found, rounds)):
        assert len(closed) == 4
        assert outcome.closes_s == sorted(outcome.closes_s)
        assert outcome.finish_s == outcome.closes_s[-1] >= outcome.arrival_s
        for devices in closed:
            assert len(devices) == jobs()[index].needed == len(set(devices.tolist()))
            assert all(masks[device] >> index & 1 for device in devices)
        assert outcome.answered == sum(map(len, closed)) <= outcome.assigned
    # What phones were charged is what the jobs were charged.
    spent = sum(joules for _, joules in phones.spent)
    assert spent == pytest.approx(sum(outcome.joules for outcome in found))


def test_a_run_is_the_same_twice() -> None:
    first, rounds, *_ = play(VENN)
    second, again, *_ = play(VENN)
    assert [o.closes_s for o in first] == [o.closes_s for o in second]
    assert all(np.array_equal(a, b) for x, y in zip(rounds, again) for a, b in zip(x, y))


def test_a_phone_works_for_one_job_at_a_time() -> None:
    phones = Witness()
    busy: dict[int, float] = {}
    cost, spend = phones.cost, phones.spend

    def starts(phone: int, steps: int):  # type: ignore[no-untyped-def]
        assert phone not in busy
        busy[phone] = 1.0
        return cost(phone, steps)

    def ends(phone: int, joules: float, now_s: float) -> None:
        del busy[phone]
        spend(phone, joules, now_s)

    phones.cost, phones.spend = starts, ends  # type: ignore[method-assign]
    run_shared(phones, np.full(COUNT, 3), jobs(), VENN, [lambda *_: None, lambda *_: None])


def test_a_debtor_sits_out_until_the_night_and_pays_for_exploring_once() -> None:
    phones = Phones(fleet(), 1.0, 20.0, 5)
    first, second = phones.cost(0, 100), phones.cost(0, 100)
    assert first.joules > second.joules
    phones.spend(0, 1e9, 0.5 * DAY_S)
    assert phones.owes(0, 0.6 * DAY_S)
    assert not phones.owes(1, 0.6 * DAY_S)
    assert not phones.owes(0, 1.1 * DAY_S)


def test_offline_phones_come_back_with_the_day() -> None:
    phones = Phones(fleet(), 0.25, 20.0, 5)
    for phone in range(10):
        now_s = phones.first_checkin_s(phone, 900.0)
        assert 0.0 <= now_s < DAY_S + 900.0
        assert phones.left_s(phone, now_s) > 0.0
        later = phones.next_checkin_s(phone, now_s, phones.left_s(phone, now_s) + 1.0)
        assert phones.left_s(phone, later) > 0.0
        assert later - now_s >= 0.7 * DAY_S


def test_what_cannot_be_run_is_refused() -> None:
    phones = Phones(fleet(), 0.3, 20.0, 5)
    ones = np.ones(COUNT, dtype=np.int64)
    with pytest.raises(ConfigError, match="jobs"):
        run_shared(phones, ones, [], VENN, [])
    with pytest.raises(ConfigError, match="masks"):
        run_shared(phones, ones[:-1], jobs()[:1], VENN, [lambda *_: None])
    with pytest.raises(InfeasibleError, match="strong"):
        run_shared(phones, ones, jobs(), VENN, [lambda *_: None] * 2)
    slow = FleetJob(name="never", group=0, participants=8, rounds=3, deadline_s=1.0)
    with pytest.raises(InfeasibleError, match="never did not finish"):
        run_shared(phones, ones, [slow], VENN, [lambda *_: None], SharedFleetConfig(days=0.5))
    with pytest.raises(ConfigError, match="bounds"):
        masks_of(np.ones(3), (math.nan,))
    with pytest.raises(ConfigError, match="fraction"):
        FleetJob(name="x", group=0, participants=1, rounds=1, fraction=0.0)
