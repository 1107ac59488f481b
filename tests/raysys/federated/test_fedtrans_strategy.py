"""FedTrans: assignment under capacity, mixtures, the strategy on the core, resume, its rivals."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.datasets import as_samples
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec, Weights
from raysys.federated.core.partition import iid
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round, run_rounds
from raysys.federated.core.server import Momentum
from raysys.federated.core.strategy import JobFacts
from raysys.federated.core.training import Samples
from raysys.federated.fedtrans.cells import Dense
from raysys.federated.fedtrans.clients import ClientManager
from raysys.federated.fedtrans.config import (
    AssignmentConfig,
    FedTransConfig,
    GrowthConfig,
    MixtureConfig,
)
from raysys.federated.fedtrans.lineage import derive, first_model, similarity
from raysys.federated.fedtrans.mixture import borrowed, mixed
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.rivals.capped import CappedFedAvg
from raysys.federated.fedtrans.rivals.splitmix import SplitMix
from raysys.federated.fedtrans.rivals.submodels import Submodels
from raysys.federated.fedtrans.strategy import FedTrans
from raysys.federated.fedtrans.transform import Step

LOCAL = LocalConfig(steps=4, batch_size=5, lr=0.1)
NET = CellNet(shape=(8,), cells=(Dense(width=4),), classes=3)
CLIENTS = 30
QUICK = GrowthConfig(delta=2, gamma=2, smooth=1, beta=10.0, max_models=4, widen=2.0)


@pytest.fixture(scope="module")
def task() -> tuple[Samples, Population]:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 600)
    inputs = rng.standard_normal((600, 8)).astype(np.float32)
    inputs[:, :3] += 2.0 * np.eye(3, dtype=np.float32)[targets]
    rates = NET.macs() * np.exp(rng.uniform(0, np.log(32), CLIENTS))
    rates[:3] = NET.macs() / 2  # too weak for anything
    population = dataclasses.replace(iid(600, CLIENTS, 0), rate_mac_s=rates)
    return as_samples(inputs, targets.astype(np.int64)), population


def strategy(growth: GrowthConfig = QUICK, mixture: MixtureConfig | None = None) -> FedTrans:
    def line(spec: ModelSpec, start: Weights | None) -> FedAvg:
        return FedAvg(spec, LOCAL, 10, Momentum(1.0, 0.5), start_weights=start)

    config = FedTransConfig(growth=growth, mixture=mixture or MixtureConfig())
    return FedTrans(NET, 10, line, config)


def test_it_grows_and_every_device_gets_what_it_can_run(task: tuple[Samples, Population]) -> None:
    samples, population = task
    ours = strategy()
    reports = run_rounds(FederatedJob(ours, population, 3), samples, 25)
    assert len(ours.family()) == 4
    assert population.rate_mac_s is not None
    best = ours.best_models(np.arange(CLIENTS))
    assert (best[:3] == -1).all()
    assert ours.predict_plan(0) == [(0, 1.0)]
    served = best >= 0
    assert served.sum() == CLIENTS - 3
    cost = np.asarray(ours.macs())[best[served]]
    assert (cost <= population.rate_mac_s[served]).all()
    assert len(np.unique(best[served])) > 1
    for report in reports:
        assert not np.isin(report.table.clients, [0, 1, 2]).any()
    why = ours.explain_transform()
    assert [entry.parent for entry in why] == [0, 1, 2]
    assert all(entry.plan.macs_after > entry.plan.macs_before for entry in why)
    # One decision per window: the delta + gamma rounds after a birth bring none.
    assert min(np.diff([entry.round_id for entry in why])) >= QUICK.delta + QUICK.gamma


def test_without_growth_it_is_federated_averaging_to_the_bit(
    task: tuple[Samples, Population],
) -> None:
    samples, population = task
    able = dataclasses.replace(population, rate_mac_s=None)
    ours = strategy(GrowthConfig(enabled=False))
    plain = FedAvg(NET.spec(), LOCAL, 10, Momentum(1.0, 0.5))
    for each in (ours, plain):
        run_rounds(FederatedJob(each, able, 3), samples, 8)
    assert np.array_equal(ours.weights(0), plain.weights(0))


@pytest.mark.parametrize("what", ["updates", "weights"])
def test_resuming_before_and_after_a_birth_changes_nothing(
    task: tuple[Samples, Population], what: str
) -> None:
    samples, population = task
    mixture = MixtureConfig(what=what)
    whole = FederatedJob(strategy(mixture=mixture), population, 3)
    run_rounds(whole, samples, 12)
    first = FederatedJob(strategy(mixture=mixture), population, 3)
    births = []
    while first.round_id < 12:
        before = len(first.strategy.family())  # type: ignore[attr-defined]
        run_round(first, samples)
        state = first.state()
        first = FederatedJob(strategy(mixture=mixture), population, 3)
        first.load(state)
        if len(first.strategy.family()) > before:  # type: ignore[attr-defined]
            births.append(first.round_id)
    assert births
    ours, theirs = whole.state(), first.state()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


def test_a_state_of_something_else_is_refused(task: tuple[Samples, Population]) -> None:
    _, population = task
    ours = strategy()
    ours.start(JobFacts(population, 0))
    with pytest.raises(ConfigError, match="FedTrans"):
        ours.load({"weights": np.zeros(3)})
    other = FedTrans(
        CellNet(shape=(8,), cells=(Dense(width=2),), classes=3),
        10,
        lambda spec, start: FedAvg(spec, LOCAL, 10, start_weights=start),
    )
    other.start(JobFacts(population, 0))
    with pytest.raises(ConfigError, match="net"):
        other.load(ours.state())


def test_too_few_able_devices_are_refused_before_the_first_round(
    task: tuple[Samples, Population],
) -> None:
    _, population = task
    weak = dataclasses.replace(population, rate_mac_s=np.full(CLIENTS, 1.0))
    with pytest.raises(InfeasibleError, match="smaller model"):
        FederatedJob(strategy(), weak, 0)


def test_the_first_model_is_never_retired_and_others_are(task: tuple[Samples, Population]) -> None:
    samples, population = task
    ours = strategy()
    run_rounds(FederatedJob(ours, population, 3), samples, 12)
    ours.retire(1, 12)
    assert 1 not in ours.best_models(np.arange(CLIENTS))
    placed = ours.assign(12, np.arange(3, CLIENTS))
    assert 1 not in [part.model_id for part in placed]
    with pytest.raises(ConfigError, match="weakest"):
        ours.retire(0, 12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), round_id=st.integers(0, 50))
def test_no_assignment_is_above_capacity_and_order_does_not_matter(
    seed: int, round_id: int
) -> None:
    rng = np.random.default_rng(seed)
    macs = np.cumsum(rng.integers(1, 50, 5))
    manager = ClientManager(rng.uniform(0, 200, 40), AssignmentConfig(), seed)
    for parent in range(4):
        manager.inherit(parent)
    active = rng.random(5) < 0.8
    clients = rng.permutation(40)
    allowed = manager.compatible(clients, macs.tolist(), active)
    manager.learn(
        clients[:20], rng.integers(0, 5, 20), rng.standard_normal(20), allowed[:20], np.eye(5)
    )
    placed = manager.place(round_id, clients, allowed)
    fits = placed >= 0
    assert np.array_equal(fits, allowed.any(axis=1))
    assert (macs[placed[fits]] <= manager.capacity[clients[fits]]).all()
    assert active[placed[fits]].all()
    one_by_one = [
        int(manager.place(round_id, clients[k : k + 1], allowed[k : k + 1])[0]) for k in range(40)
    ]
    assert placed.tolist() == one_by_one


def test_a_bad_loss_sends_a_client_elsewhere_and_numbers_stay_bounded() -> None:
    manager = ClientManager(np.full(8, np.inf), AssignmentConfig(bound=2.0), 0)
    manager.inherit(0)
    clients, both = np.arange(8), np.ones((8, 2), dtype=bool)
    models = np.array([0] * 7 + [1])
    losses = np.array([1.0, 1, 1, 1, 1, 1, 5.0, 3.0])
    for _ in range(20):
        manager.learn(clients, models, losses, both, np.eye(2))
    found = manager.utility(clients)
    assert found[6].tolist() == [-2.0, 0.0]  # a poor fit, bounded
    assert found[0].tolist() == [0.0, -2.0]
    assert manager.best(clients, both, [1, 2])[6] == 1
    before = manager.utility(clients)
    manager.learn(clients[:1], models[:1], np.array([np.nan]), both[:1], np.eye(2))
    manager.learn(clients[:1], models[:1], np.array([1.0]), both[:1], np.eye(2))  # no spread
    assert np.array_equal(manager.utility(clients), before)


def test_what_tells_models_apart_outlives_hard_data_and_new_models_get_a_head_start() -> None:
    manager = ClientManager(np.array([9.0, 9.0, 1.0]), AssignmentConfig(head_start=1.0), 0)
    manager.inherit(0)
    clients = np.arange(3)
    allowed = manager.compatible(clients, [1, 2], np.ones(2, dtype=bool))
    assert manager.best(clients, allowed, [1, 2]).tolist() == [1, 1, 0]
    alike = np.array([[1.0, 0.5], [0.5, 1.0]])
    losses = np.array([1.0, 9.0, 1.0])  # the second client's data are hard for any model
    for models in ([0, 0, 0], [1, 1, 0]) * 20:
        manager.learn(clients, np.array(models), losses, allowed, alike)
    found = manager.utility(clients)
    assert (found <= 0).all()
    assert (found[allowed.any(axis=1)].max(axis=1) == 0).all()
    # It tried both equally often: the head start is what is left.
    assert found[1] == pytest.approx([-1.0, 0.0], abs=1e-5)
    assert manager.best(clients, allowed, [1, 2])[1] == 1


@pytest.mark.parametrize("projection", ["lineage", "crop"])
@pytest.mark.parametrize("age", [0, 7, 500])
def test_constants_in_constants_out(projection: str, age: int) -> None:
    parent = first_model(CellNet(shape=(6,), cells=(Dense(width=4), Dense(width=4))))
    # Deepening leaves every other weight as it is, so constants stay constants on the way.
    child = derive(parent, 0, [Step(op="deepen", cell=1), Step(op="deepen", cell=0)], 0)
    family = [parent, child]
    weights = [np.full(m.net.n_params, 0.25, dtype=np.float32) for m in family]
    config = MixtureConfig(what="weights", projection=projection, eta=0.9)
    assert np.allclose(mixed(family, weights, 1, age, config), 0.25, atol=1e-7)
    assert mixed(family, weights, 0, age, config) is weights[0]
    sums = {k: ModelSum(np.full(m.net.n_params, 2.0), weight=8.0) for k, m in enumerate(family)}
    assert np.allclose(borrowed(family, sums, 1, age, config).mean(), 0.25)
    printed = dataclasses.replace(config, normalise=False)
    shrunk = mixed(family, weights, 1, 500, printed)
    assert shrunk.min() < 0.2  # the printed denominator loses weight


def test_parent_and_child_lend_each_other_what_they_share() -> None:
    parent = first_model(NET)
    child = derive(parent, 0, [Step(op="widen", cell=0, factor=2.0)], 0)
    family = [parent, child]
    alike = similarity(family, 0, 1)
    down, up = np.full(NET.n_params, 6.0), np.full(child.net.n_params, 2.0)
    sums = {0: ModelSum(3 * down, weight=3.0), 1: ModelSum(5 * up, weight=5.0)}
    both = MixtureConfig()
    # Means of 6 (weight 3) and 2 (weight 5), the other's weight times the similarity.
    assert np.allclose(
        borrowed(family, sums, 0, 40, both).mean(), (18 + alike * 10) / (3 + alike * 5)
    )
    found = borrowed(family, sums, 1, 40, both).mean()
    shared = (10 + alike * 18) / (5 + alike * 3)
    assert np.isclose(found, shared).sum() == NET.n_params
    assert np.isclose(found, 2.0).sum() == child.net.n_params - NET.n_params  # fresh units
    printed = dataclasses.replace(both, lend="down")
    assert borrowed(family, sums, 0, 40, printed) is sums[0]
    decayed = borrowed(family, sums, 0, 40, dataclasses.replace(both, eta=0.5))
    assert np.allclose(decayed.mean(), 6.0, atol=1e-6)


def test_nobody_lends_to_a_model_whose_relatives_did_not_take_part() -> None:
    parent = first_model(NET)
    child = derive(parent, 0, [Step(op="widen", cell=0)], 0)
    total = ModelSum(np.arange(child.net.n_params, dtype=np.float64), weight=3.0)
    alone = borrowed([parent, child], {1: total}, 1, 5, MixtureConfig())
    assert np.allclose(alone.mean(), total.mean())


def test_sub_models_are_parts_of_the_full_one(task: tuple[Samples, Population]) -> None:
    samples, population = task
    sizes = (8, 16, 8, 3)
    for rule in ("heterofl", "fedrolex", "fluid"):
        rival = Submodels(sizes, LOCAL, 10, rule)
        reports = run_rounds(FederatedJob(rival, population, 1), samples, 4)
        assert reports[-1].counts["ok"] == 10
        assert population.rate_mac_s is not None
        strong = population.rate_mac_s >= min(rival.level_macs)
        levels = rival.level_of(np.flatnonzero(strong))
        cost = np.asarray(rival.level_macs)[levels]
        assert (cost <= population.rate_mac_s[strong]).all()
        for level, part in enumerate(rival.level_sizes):
            assert len(rival.weights(level)) == sum(
                (a + 1) * b for a, b in itertools.pairwise(part)
            )
        full = Submodels(sizes, LOCAL, 10, rule)
        full.start(JobFacts(population, 1))
        full.load(rival.state())
        assert np.array_equal(full.weights(2), rival.weights(2))
    rolex = Submodels(sizes, LOCAL, 10, "fedrolex")
    rolex.start(JobFacts(population, 1))
    before = rolex.units(3)[0]
    rolex.assign(5, np.arange(3, 6))
    assert not np.array_equal(before, rolex.units(3)[0])


def test_a_coordinate_is_averaged_over_those_who_held_it(
    task: tuple[Samples, Population],
) -> None:
    _, population = task
    rival = Submodels((2, 4, 2), LOCAL, 1, "heterofl", ratios=(1.0, 0.5))
    rival.start(JobFacts(population, 1))
    before = rival.weights(0).copy()
    rival.assign(0, np.array([5]))
    rival.fold(0, 0, ModelSum(np.full(len(rival.weights(0)), 3.0), weight=1.0))
    rival.fold(0, 1, ModelSum(np.full(len(rival.weights(1)), 9.0), weight=3.0))
    rival.close(0, None)  # type: ignore[arg-type]
    moved = np.round(rival.weights(0) - before, 5)
    # Both levels moved by 3 where only one held a coordinate, and (3 + 9) / 4 where both did.
    assert set(moved.tolist()) == {3.0}


def test_base_nets_are_trained_alike_and_as_many_as_fit(
    task: tuple[Samples, Population],
) -> None:
    samples, population = task
    rival = SplitMix((8, 16, 3), LOCAL, 10, m=8)
    start = JobFacts(population, 1)
    rival.start(start)
    before = [rival.weights(k).copy() for k in range(8)]
    run_rounds(FederatedJob(rival, population, 1), samples, 6)
    assert all(not np.array_equal(rival.weights(k), before[k]) for k in range(8))
    assert population.rate_mac_s is not None
    for client in range(3, CLIENTS):
        nets = rival.predict_plan(client)
        assert len(nets) == min(8, int(population.rate_mac_s[client] // rival.base_macs))
        assert sum(share for _, share in nets) == pytest.approx(1.0)


def test_a_capped_job_asks_for_capable_devices_only(task: tuple[Samples, Population]) -> None:
    samples, population = task
    assert population.rate_mac_s is not None
    limit = float(np.median(population.rate_mac_s))
    capped = CappedFedAvg(ModelSpec(architecture=Mlp(sizes=(8, 6, 3))), LOCAL, 5, limit)
    reports = run_rounds(FederatedJob(capped, population, 0), samples, 3)
    for report in reports:
        assert (population.rate_mac_s[report.table.clients] >= limit).all()
