"""FedTrans: what happens with odd devices, odd losses, damaged records and late updates."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from raysys.errors import ConfigError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.datasets import as_samples
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import ModelSpec, Weights, load_flat
from raysys.federated.core.partition import iid
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.strategy import JobFacts
from raysys.federated.core.training import Samples
from raysys.federated.fedtrans.attention import Patches
from raysys.federated.fedtrans.cells import Conv, Dense
from raysys.federated.fedtrans.config import AssignmentConfig, FedTransConfig, GrowthConfig
from raysys.federated.fedtrans.growth import degree_of_convergence, threshold
from raysys.federated.fedtrans.journal import Journal
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.strategy import FedTrans
from raysys.federated.fedtrans.transform import apply_step, apply_weights, possible_steps
from raysys.federated.fedtrans.zoo import ZOO

NET = CellNet(shape=(6,), cells=(Dense(width=3),), classes=3)
LOCAL = LocalConfig(steps=3, batch_size=5, lr=0.1)
GROWTH = GrowthConfig(delta=2, gamma=2, smooth=1, beta=10.0, max_models=4, widen=2.0)
CLIENTS = 20


def family(
    net: CellNet = NET, growth: GrowthConfig = GROWTH, assignment: AssignmentConfig | None = None
) -> FedTrans:
    def line(spec: ModelSpec, start: Weights | None) -> FedAvg:
        return FedAvg(spec, LOCAL, 8, start_weights=start)

    config = FedTransConfig(growth=growth, assignment=assignment or AssignmentConfig())
    return FedTrans(net, 8, line, config)


def task(rates: list[float] | None = None, net: CellNet = NET) -> tuple[Samples, Population]:
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((300, *net.shape), dtype=np.float32)
    if net.task == "regression":
        targets = inputs[:, : net.classes].copy()
    else:
        targets = rng.integers(0, net.classes, 300)
    speeds = np.full(CLIENTS, 1e9) if rates is None else np.array(rates)
    population = dataclasses.replace(iid(300, CLIENTS, 0), rate_mac_s=speeds)
    return as_samples(inputs, targets), population


def grown(rounds: int = 11) -> tuple[FedTrans, FederatedJob, Samples]:
    samples, population = task()
    ours = family()
    job = FederatedJob(ours, population, 3)
    run_rounds(job, samples, rounds)
    assert len(ours.family()) == 3
    return ours, job, samples


@pytest.mark.parametrize("rate", [0.0, float("nan"), float("inf"), -3.0])
def test_a_capacity_that_is_none_is_refused_with_the_client(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"rate_mac_s\[4\]"):
        task([1e9] * 4 + [rate] + [1e9] * 15)
    ours, _, _ = grown()
    with pytest.raises(ConfigError, match=r"capacity\[7\]"):
        ours.resize(np.array([2, 7]), np.array([5.0, rate]))
    assert ours.manager.capacity[2] == 1e9  # nothing was taken over


def test_a_capacity_that_changes_counts_from_the_next_draw_and_is_kept() -> None:
    ours, job, samples = grown()
    assert ours.best_model(5) >= 0
    ours.resize(np.array([5, 6]), np.array([NET.macs() / 2, NET.macs()]))
    for round_id in range(30):
        placed = ours.assign(round_id, np.array([5, 6]))
        assert [part.clients.tolist() for part in placed] == [[6]]
        assert placed[0].model_id == 0
    assert ours.best_model(5) == -1
    assert ours.predict_plan(5) == [(0, 1.0)]
    run_rounds(job, samples, 14)
    again = family()
    FederatedJob(again, job.population, 3).load(job.state())
    assert again.best_model(5) == -1


def test_equal_devices_grow_until_nothing_larger_fits() -> None:
    samples, population = task([NET.macs() * 2.5] * CLIENTS)
    ours = family(growth=dataclasses.replace(GROWTH, max_models=8))
    run_rounds(FederatedJob(ours, population, 3), samples, 25)
    assert max(ours.macs()) <= NET.macs() * 2.5
    last = ours.explain_transform()[-1].plan
    assert not last.steps
    assert last.dropped
    assert "no larger model fits" in ours.verdict(25).why


def test_only_capacities_seen_lately_count() -> None:
    journal = Journal(GrowthConfig(capacity_rounds=3))
    assert journal.largest_capacity() == float("inf")
    for capacity in (50.0, 10.0, 10.0):
        journal.participants(np.array([0]), np.array([capacity]), 1)
    assert journal.largest_capacity() == 50.0
    journal.participants(np.array([0]), np.array([10.0]), 1)
    assert journal.largest_capacity() == 10.0
    assert journal.exhausted(10)
    assert not journal.exhausted(9)


def test_a_model_without_cells_to_transform_stays_as_it_is() -> None:
    net = CellNet(shape=(1, 4, 4), cells=(Patches(patch=2, dim=4),), classes=3)
    samples, population = task(net=net)
    ours = family(net)
    run_rounds(FederatedJob(ours, population, 3), samples, 10)
    assert len(ours.family()) == 1
    only = ours.explain_transform()
    assert [entry.plan.steps for entry in only] == [()]


def test_negative_and_rising_losses_are_judged_by_their_slope() -> None:
    config = GrowthConfig(delta=2, gamma=2, smooth=1, beta=0.1, beta_relative=0.01)
    journal = Journal(config)
    for loss in (-5.0, -5.2, -5.4, -5.6, -5.8):
        journal.loss(loss)
    assert degree_of_convergence(journal.losses, config) == pytest.approx(0.2)
    assert threshold(journal.losses, config) == pytest.approx(0.05)  # of the first, by its size
    assert "still learning" in journal.verdict(5, 1, 10).why
    rising = Journal(config)
    for loss in (1.0, 1.5, 2.0, 2.5, 3.0):
        rising.loss(loss)
    assert "divergence" in rising.verdict(5, 1, 10).why
    rising.loss(float("nan"))
    assert len(rising.losses) == 5
    level = Journal(config)
    for _ in range(5):
        level.loss(1.0)
    assert level.verdict(5, 1, 10).go


def test_a_regression_family_grows_too() -> None:
    net = CellNet(shape=(6,), cells=(Dense(width=3),), classes=2, task="regression")
    samples, population = task(net=net)
    ours = family(net)
    first, *_, last = run_rounds(FederatedJob(ours, population, 3), samples, 12)
    assert len(ours.family()) == 4
    assert last.loss_last < first.loss_first


def test_sums_of_a_retired_model_count_and_of_an_unknown_one_are_refused() -> None:
    ours, job, _ = grown()
    opened = job.open_round()
    assert any(1 in group.model_ids for group in opened.groups)
    ours.retire(1, 11)
    size = ours.family()[1].net.n_params
    ours.fold(11, 1, ModelSum(np.ones(size), weight=1.0))
    with pytest.raises(ConfigError, match="model_id"):
        ours.fold(11, 3, ModelSum(np.ones(size), weight=1.0))


def test_a_model_that_hardly_anyone_chooses_is_retired_and_lends_no_more() -> None:
    samples, population = task()
    assignment = AssignmentConfig(retire_rounds=4, retire_share=0.9)
    ours = family(assignment=assignment)
    run_rounds(FederatedJob(ours, population, 3), samples, 16)
    retired = [k for k, model in enumerate(ours.family()) if model.retired is not None]
    assert retired
    assert 0 not in retired
    assert len(ours.family()) - 1 not in retired
    assert set(ours.best_models(np.arange(CLIENTS)).tolist()).isdisjoint(retired)


def test_damaged_records_and_weights_of_another_shape_are_refused() -> None:
    ours, job, _ = grown()
    state = ours.state()

    def loaded(**changes: np.ndarray) -> None:
        fresh = family()
        fresh.start(JobFacts(job.population, 3))
        fresh.load({**state, **changes})

    loaded()
    records = json.loads(state["family"].tobytes())
    second = json.loads(records[1])
    for field, value in (("inherited", [1.0, 1.0]), ("parent", 2), ("steps", [])):
        changed = [records[0], json.dumps({**second, field: value}), *records[2:]]
        text = np.frombuffer(json.dumps(changed).encode(), dtype=np.uint8)
        with pytest.raises(ConfigError):
            loaded(family=text)
    with pytest.raises(ConfigError, match="weights"):
        loaded(**{"line1.weights": state["line1.weights"][:-1]})
    with pytest.raises(ConfigError, match="population"):
        loaded(**{"clients.capacity": state["clients.capacity"][:-1]})


def test_devices_may_come_one_by_one() -> None:
    ours, job, _ = grown()
    clients = np.arange(CLIENTS)
    ours.demand(11)
    together = {
        int(client): part.model_id for part in ours.assign(11, clients) for client in part.clients
    }
    ours.demand(11)
    alone = {
        int(client): part.model_id
        for client in np.random.default_rng(0).permutation(clients)
        for part in ours.assign(11, np.array([client]))
    }
    assert alone == together
    assert len(set(alone.values())) > 1
    assert job.round_id == 11


@pytest.mark.parametrize("name", ZOO)
def test_half_precision_changes_outputs_by_its_rounding_only(name: str) -> None:
    """Weights kept as float16 before and after an operation: off by what float16 loses."""
    net = ZOO[name]
    inputs = torch.from_numpy(
        np.random.default_rng(0).standard_normal((7, *net.shape), dtype=np.float32)
    )

    def run(net: CellNet, values: np.ndarray) -> np.ndarray:
        module = load_flat(net.build(), values.astype(np.float16).astype(np.float32)).eval()
        with torch.inference_mode():
            found: np.ndarray = module(inputs).numpy()
        return found

    values = net.initial(2)
    before = run(net, values)
    for step in possible_steps(net, 2.0, 5):
        after = run(apply_step(net, step), apply_weights(net, values, step))
        assert np.abs(after - before).max() <= 5e-3 * np.abs(before).max(), step


def test_a_network_is_described_in_short() -> None:
    net = CellNet(shape=(1, 4, 4), cells=(Conv(channels=3, pool=True), Dense(width=5)))
    assert net.describe() == "Conv 3, Dense 5"
    assert ZOO["attention"].describe() == "Patches, Attention 3 x 5, Attention 1 x 3"
