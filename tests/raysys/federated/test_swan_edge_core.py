"""Plans as data, rounds of devices that come one by one, willingness."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.model import Cnn, FromFactory, Mlp, ModelSpec, layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.serialize import pack_arrays
from raysys.federated.core.strategy import JobFacts
from raysys.federated.core.training import Samples
from raysys.federated.swan.energy import Battery
from raysys.federated.swan.fleet import FleetConfig, FleetOutcome, _Fleet, draw_fleet, run_fleet
from raysys.federated.swan.plans import (
    Plan,
    PlanLimits,
    PlanRefusedError,
    check_work,
    pack_update,
    pack_weights,
    plan_from_json,
    plan_to_json,
    unpack_update,
    unpack_weights,
)
from raysys.federated.swan.rounds import EdgeRound
from raysys.federated.swan.soc import RESNET34, SHUFFLENETV2
from raysys.federated.swan.willingness import (
    WillingnessConfig,
    backoff_s,
    home_of,
    parse_hours,
    quiet_left_s,
    refusal,
)

SPEC = ModelSpec(architecture=Mlp(sizes=(4, 3, 2)))
PARAMS = layout_of(SPEC).n_params
PLAN = Plan(spec=SPEC, local=LocalConfig(), client=3, seed=1, round_id=2)
LIMITS = PlanLimits(max_params=10_000, max_steps=100)
FACTS = {
    "n_samples": 10.0, "loss_first": 1.0, "loss_last": 0.5, "steps": 1.0,
    "seconds_per_step": 0.1, "joules": math.nan,
}  # fmt: skip


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(plan_to_json(PLAN)), **changes})


def test_plans_survive_the_wire() -> None:
    assert plan_from_json(plan_to_json(PLAN), LIMITS) == PLAN
    cnn = Plan(spec=ModelSpec(architecture=Cnn(hidden=(8,))), local=LocalConfig(steps=3), client=0)
    assert plan_from_json(plan_to_json(cnn), LIMITS) == cnn
    own = ModelSpec(architecture=FromFactory(factory="os:getcwd"))
    with pytest.raises(ConfigError, match="Devices run no other code"):
        plan_to_json(Plan(spec=own, local=LocalConfig(), client=0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ("x" * 70_000, "at most"),
        (edited(format=2), "format"),
        (edited(architecture="factory"), "unknown architecture"),
        (
            edited(architecture="FromFactory", sizes={"factory": "os:system"}),
            "unknown architecture",
        ),
        (edited(sizes={"sizes": [4, 100_000, 2]}), "parameters"),
        (edited(sizes={"sizes": [1] * 200}), "layers"),
        (edited(sizes={"sizes": [4, -3, 2]}), "at least 1"),
        (edited(sizes={"factory": "os:system"}), "factory"),
        (edited(sizes="?"), "an object"),
        (edited(architecture="cnn", sizes={"image": [1, 10**6, 10**6]}), "parameters|activations"),
        (edited(architecture="cnn", sizes={"channels": [0]}), "at least 1"),
        (edited(architecture="embedding_bag", sizes={"vocabulary": 10**9}), "parameters"),
        (edited(local={"lr": "NaN"}), "lr"),
        (edited(local={"batch_size": 10**9}), "batches of"),
        (edited(client=-1), "client"),
        (edited(client=True), "client"),
        (edited(seed=2**70), "seed"),
        (edited(task="execute"), "task"),
        (edited(clip_norm="x"), "could not convert"),
    ],
)
def test_hostile_plans_are_refused(text: str, reason: str) -> None:
    with pytest.raises(PlanRefusedError, match=reason):
        plan_from_json(text, LIMITS)


def test_more_work_than_allowed_is_refused() -> None:
    assert check_work(PLAN, 95, LIMITS) == 10
    with pytest.raises(PlanRefusedError, match="100000 steps"):
        check_work(Plan(spec=SPEC, local=LocalConfig(steps=100_000), client=0), 10, LIMITS)
    with pytest.raises(PlanRefusedError, match="0 steps"):
        check_work(PLAN, 0, LIMITS)


def test_hostile_models_are_refused() -> None:
    good = np.zeros(PARAMS, dtype=np.float32)
    assert np.array_equal(unpack_weights(pack_weights(good), SPEC), good)
    bad = {
        "float32": pack_weights(np.zeros(PARAMS + 1, dtype=np.float32)),
        "float64": pack_arrays({"weights": np.zeros(PARAMS)}),
        "NaN": pack_weights(np.full(PARAMS, np.nan, dtype=np.float32)),
        "weights are None": pack_arrays({"other": good}),
        "damaged": b"\x80\x04cos\nsystem\n",
        "refused": b"",
    }
    for reason, content in bad.items():
        with pytest.raises(PlanRefusedError, match=reason):
            unpack_weights(content, SPEC)


def test_impossible_updates_are_refused() -> None:
    layout = layout_of(SPEC)
    delta = np.ones(PARAMS, dtype=np.float32)
    back, facts = unpack_update(pack_update(delta, FACTS), layout)
    assert np.array_equal(back, delta)
    assert facts["n_samples"] == 10.0
    for wrong in ({"n_samples": 1e12}, {"n_samples": math.nan}, {"steps": -1.0}):
        with pytest.raises(DataError, match="claims"):
            unpack_update(pack_update(delta, {**FACTS, **wrong}), layout)
    with pytest.raises(DataError, match="update is not"):
        unpack_update(pack_update(delta[1:], FACTS), layout)


def fresh_round(wanted: int = 2, reject_above: float = math.inf) -> EdgeRound:
    line = FedAvg(SPEC, LocalConfig(), 2)
    offsets = np.zeros(9, dtype=np.int64)
    population = Population(offsets=offsets, sample_ids=np.zeros(0, dtype=np.int32))
    line.start(JobFacts(population, 0))
    screen = ScreenConfig(clip_norm=None)
    return EdgeRound(
        line, 0, wanted, seed=0, secret=b"s" * 32, screen=screen, reject_above=reject_above
    )


def lease(number: int) -> tuple[str, int, int]:
    return "gateway", 1, number


def test_round_folds_in_the_order_of_clients_whoever_came_first() -> None:
    rng = np.random.default_rng(0)
    updates = {c: rng.standard_normal(PARAMS).astype(np.float32) for c in range(4)}
    results = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        opened = fresh_round(wanted=4)
        for client in order:
            device = bytes([client])
            admission = opened.admit(lease(client), device, client)
            content = pack_update(updates[client], {**FACTS, "n_samples": client + 1.0})
            assert opened.answer(lease(client), device, admission.nonce, content)
        assert opened.complete
        before = opened.weights
        report = opened.close()
        results.append(opened.strategy.weights(0))
        mean = sum((c + 1) * updates[c].astype(np.float64) for c in range(4)) / 10
        assert np.allclose(results[-1] - before, mean, atol=1e-6)
        assert report.counts["ok"] == 4
        assert report.macs == 3 * PARAMS * (1 + 2 + 3 + 4)
    assert np.array_equal(*results)


def test_round_refuses_what_is_not_of_it() -> None:
    opened = fresh_round()
    content = pack_update(np.ones(PARAMS, dtype=np.float32), FACTS)
    admission = opened.admit(lease(1), b"a", 0)
    assert opened.admit(lease(1), b"a", 0) is admission, "asking again gives the same plan"
    with pytest.raises(InfeasibleError, match="another device"):
        opened.admit(lease(1), b"thief", 1)
    for key, device, nonce in (
        (lease(9), b"a", admission.nonce),
        (lease(1), b"thief", admission.nonce),
        (lease(1), b"a", b"guess"),
    ):
        with pytest.raises(InfeasibleError, match="not of this round"):
            opened.answer(key, device, nonce, content)
    assert opened.answer(lease(1), b"a", admission.nonce, content)
    assert opened.answer(lease(1), b"a", admission.nonce, content), "a replay changes nothing"
    assert (opened.answers, opened.duplicates) == (1, 1)
    with pytest.raises(InfeasibleError, match="has answered"):
        opened.admit(lease(2), b"a", 0)
    late = opened.admit(lease(3), b"b", 1)
    opened.close()
    with pytest.raises(InfeasibleError, match="is closed"):
        opened.answer(lease(3), b"b", late.nonce, content)
    with pytest.raises(InfeasibleError, match="is closed"):
        opened.admit(lease(4), b"c", 2)


def test_round_screens_updates_and_forgets_lost_leases() -> None:
    opened = fresh_round(reject_above=5.0)
    opened.admit(lease(1), b"a", 0)
    again = opened.admit(lease(2), b"a", 0)
    huge = pack_update(np.full(PARAMS, 1e3, dtype=np.float32), FACTS)
    assert not opened.answer(lease(2), b"a", again.nonce, huge)
    other = opened.admit(lease(3), b"b", 1)
    broken = pack_update(np.full(PARAMS, np.inf, dtype=np.float32), FACTS)
    assert not opened.answer(lease(3), b"b", other.nonce, broken)
    before = opened.weights
    report = opened.close()
    assert np.array_equal(opened.strategy.weights(0), before)
    assert (report.counts["rejected"], report.counts["nonfinite"]) == (1, 1)


def test_willingness() -> None:
    config = WillingnessConfig(quiet_hours="22-7, 12-13.5", only_charging=False)
    plugged, away = Battery(), Battery(level=0.2, external=False)
    hour = 3600.0
    assert refusal(config, 23 * hour, plugged) == "quiet hours"
    assert quiet_left_s(config, 6 * hour) == hour
    assert quiet_left_s(config, 12.5 * hour) == hour
    assert refusal(config, 10 * hour, plugged) == ""
    assert refusal(config, 10 * hour, away) == "battery is low"
    assert refusal(config, 10 * hour, plugged, celsius=50.0) == "too warm"
    charged = Battery(level=0.9, external=False)
    assert refusal(config, 10 * hour, charged, loan="owes") == "owes"
    assert refusal(WillingnessConfig(only_charging=True), 0.0, charged) == "not charging"
    for text in ("25-3", "a-b", "7", "5-5"):
        with pytest.raises(ConfigError, match="quiet_hours"):
            parse_hours(text)
    homes = [home_of(bytes([n]) + bytes(15), 3) for n in range(6)]
    assert homes == [0, 1, 2, 0, 1, 2], "a device keeps to one of several gateways"
    waits = [backoff_s(n, 0.5) for n in range(1, 40)]
    assert waits == sorted(waits)
    assert waits[-1] <= 300.0


def test_fleet_owes_less_on_better_cores() -> None:
    greedy = draw_fleet(50, SHUFFLENETV2, 4.0, "greedy", 1.0, 0)
    swan = draw_fleet(50, SHUFFLENETV2, 4.0, "swan", 1.0, 0)
    assert all(a.phone == b.phone for a, b in zip(greedy, swan))
    assert all(a.step_s > 7 * b.step_s and a.step_j > 15 * b.step_j for a, b in zip(greedy, swan))
    with pytest.raises(ConfigError, match="devices"):
        FleetConfig(devices=10, per_round=20)


def test_fleet_pays_for_exploring_and_saves_when_it_owes() -> None:
    fleet = _Fleet(FleetConfig(devices=40, per_round=5, beta=0.0), RESNET34)
    greedy = _Fleet(FleetConfig(devices=40, per_round=5, beta=0.0, policy="greedy"), RESNET34)
    everyone = np.arange(40)
    fresh_s, fresh_j = fleet._step_costs(everyone)
    assert np.allclose(fresh_s, greedy._step_costs(everyone)[0]), "greedy is the best one here"
    extra_s, _ = fleet._first_costs(everyone)
    names = [device.phone.name for device in fleet._devices]
    for name in set(names):
        mine = [extra for extra, other in zip(extra_s.tolist(), names) if other == name]
        assert min(mine[:3]) > 3 * max(mine[3:]), "three explore, the others verify"
    assert not fleet._first_costs(everyone)[0].any(), "only once"
    assert not greedy._first_costs(everyone)[0].any()
    fleet.loan_j[:] = 0.9 * fleet.allowance_j
    owing_s, owing_j = fleet._step_costs(everyone)
    assert (owing_s >= fresh_s).all()
    assert (owing_j <= fresh_j).all()
    assert owing_j.sum() < 0.95 * fresh_j.sum()


def test_fleet_ends_when_the_mean_of_some_rounds_reaches_the_target() -> None:
    rng = np.random.default_rng(0)
    samples = Samples(
        torch.from_numpy(rng.standard_normal((40, 4), dtype=np.float32)),
        torch.from_numpy(rng.integers(0, 2, 40)),
    )
    population = Population(offsets=np.arange(0, 41, 4), sample_ids=np.arange(40, dtype=np.int32))

    def run(policy: str) -> FleetOutcome:
        told = iter([0.95, 0.1, 0.95, 0.95, 0.1])
        config = FleetConfig(
            devices=10, per_round=3, online=1.0, policy=policy, target=0.9, smooth=2, rounds=5
        )
        line = FedAvg(SPEC, LocalConfig(), 3)
        return run_fleet(config, SHUFFLENETV2, line, population, samples, lambda _: next(told))

    swan, greedy = run("swan"), run("greedy")
    assert (swan.reached, swan.rounds, swan.accuracy) == (True, 4, 0.95)
    assert [row[2] for row in swan.history] == [0.95, 0.1, 0.95, 0.95]
    assert greedy.rounds == 4
    assert greedy.seconds > swan.seconds
    assert greedy.joules > 2 * swan.joules
