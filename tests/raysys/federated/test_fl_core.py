"""Rounds of the federated core: sums, server steps, repeats, resume, learning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fl_parts import SMALL, ragged_population, small_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.federated.core.aggregation import RoundFold
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import ExecutionConfig, FederatedJob
from raysys.federated.core.evaluation import client_scores, evaluate
from raysys.federated.core.fedavg import FedAvg, QFedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import Partial, ScreenConfig
from raysys.federated.core.model import (
    Mlp,
    ModelSpec,
    load_flat,
)
from raysys.federated.core.partition import (
    iid,
    label_shards,
)
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.server import Adam, Averaging, Momentum, Yogi
from raysys.federated.core.training import train_task


def make_partial(task_id: int, clients: int = 2, value: float = 1.0) -> Partial:
    ones = np.ones(clients, dtype=np.float32)
    return Partial(
        round_id=0,
        attempt=0,
        task_id=task_id,
        spec_id="m",
        clients=np.arange(clients) + 10 * task_id,
        rows=np.zeros(clients, dtype=np.int64),
        present=np.array([0]),
        sum_delta=np.full((1, 3), value * clients),
        sum_weight=np.array([float(clients)]),
        sum_scalar=np.zeros(1),
        loss_first=ones,
        loss_last=ones,
        norm=ones,
        n_samples=np.ones(clients, dtype=np.int64),
        status=np.zeros(clients, dtype=np.int8),
    )


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=6))
@settings(max_examples=40, deadline=None)
def test_order_and_duplicates_change_nothing(order: list[int], repeated: list[int]) -> None:
    def total(sequence: list[int]) -> np.ndarray:
        fold = RoundFold(0, 0, [2] * 6, "m")
        for task in sequence:
            fold.add(make_partial(task, value=0.1 * (task + 1) ** 3))
        assert fold.sums()[0].clients == 12
        return fold.sums()[0].mean()

    assert np.array_equal(total(order + repeated), total(list(range(6))))


def test_fold_refuses_what_does_not_belong() -> None:
    fold = RoundFold(0, 0, [2], "m")
    assert not fold.add(dataclasses.replace(make_partial(0), round_id=3))
    with pytest.raises(ConfigError, match="one per client"):
        fold.add(make_partial(0, clients=1))
    with pytest.raises(ConfigError, match="Another model"):
        fold.add(dataclasses.replace(make_partial(0), spec_id="x"))
    with pytest.raises(ConfigError, match="finite"):
        fold.add(dataclasses.replace(make_partial(0), sum_delta=np.full((1, 3), np.nan)))
    with pytest.raises(ConfigError, match="every task"):
        fold.sums()


def test_a_hundred_thousand_equal_updates_average_to_themselves() -> None:
    value = 0.1234567
    fold = RoundFold(0, 0, [1000] * 100, "m")
    for task in range(100):
        fold.add(make_partial(task, clients=1000, value=value))
    assert np.abs(fold.sums()[0].mean() / value - 1).max() < 1e-6


def test_server_optimisers_by_hand() -> None:
    w, d = np.array([1.0, 2.0], dtype=np.float32), np.array([0.5, -1.0])
    assert np.allclose(Averaging(0.5).step(w, d), [1.25, 1.5])
    momentum = Momentum(beta=0.5)
    once = momentum.step(w, d)
    assert np.allclose(momentum.step(once, d), w + d + 1.5 * d)
    adam, yogi = Adam(eta=1.0, tau=0.1), Yogi(eta=1.0, tau=0.1)
    expected = w + 0.1 * d / (np.sqrt(0.01 * d**2) + 0.1)
    assert np.allclose(adam.step(w, d), expected, rtol=1e-6)
    assert np.allclose(yogi.step(w, d), expected, rtol=1e-6)  # v starts at 0, so the first agree
    v = 0.01 * d**2
    second = (
        0.19 * 0.5 * d / (np.sqrt(v - 0.01 * (0.5 * d) ** 2 * np.sign(v - (0.5 * d) ** 2)) + 0.1)
    )
    m = 0.9 * 0.1 * d + 0.1 * 0.5 * d
    second = m / (np.sqrt(v - 0.01 * (0.5 * d) ** 2 * np.sign(v - (0.5 * d) ** 2)) + 0.1)
    assert np.allclose(yogi.step(w, 0.5 * d), w + second, rtol=1e-6)
    fresh = Adam(eta=1.0, tau=0.1)
    fresh.load(adam.state())
    assert np.array_equal(fresh.step(w, d), adam.step(w, d))
    with pytest.raises(ConfigError, match="eta"):
        Averaging(0.0)


def test_one_round_is_fedavg_by_hand() -> None:
    samples, population = small_samples(), ragged_population([8, 4])
    local = LocalConfig(epochs=1, batch_size=100, lr=0.5)  # one full-batch step each
    job = FederatedJob(FedAvg(SMALL, local, 2), population, 3)
    start = job.strategy.weights(0).copy()
    run_rounds(job, samples, 1)
    expected = np.zeros_like(start, dtype=np.float64)
    for client, n in enumerate([8, 4]):
        module = load_flat(SMALL.architecture.build(), start)
        rows = torch.from_numpy(population.samples(client).astype(np.int64))
        loss = torch.nn.functional.cross_entropy(
            module(samples.inputs[rows]), samples.targets[rows]
        )
        grads = torch.autograd.grad(loss, list(module.parameters()))
        flat = torch.cat([g.reshape(-1) for g in grads]).numpy()
        expected += n / 12 * (start - 0.5 * flat)
    np.testing.assert_allclose(job.strategy.weights(0), expected, atol=1e-6)


def test_q_fedavg_with_q_zero_is_uniform_averaging_and_q_favours_the_worse() -> None:
    samples, population = small_samples(), ragged_population([8, 4, 6])
    local = LocalConfig(batch_size=4)
    uniform = FederatedJob(FedAvg(SMALL, local, 3, weighting="uniform"), population, 1)
    fair = FederatedJob(QFedAvg(SMALL, local, 3, q=0.0), population, 1)
    run_rounds(uniform, samples, 3)
    run_rounds(fair, samples, 3)
    np.testing.assert_allclose(uniform.strategy.weights(0), fair.strategy.weights(0), atol=1e-6)
    strong = FederatedJob(QFedAvg(SMALL, local, 3, q=2.0), population, 1)
    run_rounds(strong, samples, 3)
    assert np.isfinite(strong.strategy.weights(0)).all()
    assert not np.allclose(strong.strategy.weights(0), fair.strategy.weights(0))


def test_state_resumes_exactly() -> None:
    data = load_digits_data(0)
    population = iid(len(data.targets), 30, 0)
    spec = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))

    def fresh() -> FederatedJob:
        return FederatedJob(FedAvg(spec, LocalConfig(), 8, Adam()), population, 5)

    whole = fresh()
    run_rounds(whole, data.samples(), 6)
    first = fresh()
    run_rounds(first, data.samples(), 3)
    second = fresh()
    second.load(unpack_arrays(pack_arrays(first.state())))
    run_rounds(second, data.samples(), 6)
    assert np.array_equal(second.strategy.weights(0), whole.strategy.weights(0))
    other = FederatedJob(FedAvg(spec, LocalConfig(), 8, Adam()), population, 6)
    with pytest.raises(ConfigError, match="seed"):
        other.load(first.state())


def test_task_size_and_order_of_answers_do_not_matter_beyond_rounding() -> None:
    data = load_digits_data(0)
    population = iid(len(data.targets), 40, 0)
    spec = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))

    def train(task_clients: int, backwards: bool) -> np.ndarray:
        execution = ExecutionConfig(task_clients=task_clients)
        job = FederatedJob(FedAvg(spec, LocalConfig(), 20), population, 5, execution)
        for _ in range(3):
            opened = job.open_round()
            group = opened.groups[0]
            partials = [
                train_task(task, group.weights, data.samples(), population) for task in group.tasks
            ]
            for partial in reversed(partials) if backwards else partials:
                assert opened.add(0, partial)
                assert not opened.add(0, partial)
            assert job.close_round(opened) is not None
        return job.strategy.weights(0)

    assert np.array_equal(train(5, False), train(5, True))
    np.testing.assert_allclose(train(5, False), train(20, False), atol=1e-5)


def test_a_round_that_keeps_too_little_is_repeated_then_given_up() -> None:
    samples, population = small_samples(), ragged_population([5] * 10)
    samples.inputs[:] = float("nan")
    job = FederatedJob(FedAvg(SMALL, LocalConfig(), 5), population, 0)
    with pytest.raises(InfeasibleError, match="0 of 5 updates"):
        run_rounds(job, samples, 1)
    lenient = FederatedJob(
        FedAvg(SMALL, LocalConfig(), 5), population, 0, screen=ScreenConfig(min_fraction=0.0)
    )
    before = lenient.strategy.weights(0).copy()
    reports = run_rounds(lenient, samples, 1)
    assert reports[0].counts["nonfinite"] == 5
    assert np.array_equal(lenient.strategy.weights(0), before)


def test_arrays_survive_the_wire_and_damage_is_found() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([], dtype=np.int64)}
    content = pack_arrays(arrays)
    back = unpack_arrays(content)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    for bad in (b"", b"not arrow", content[: len(content) // 2]):
        with pytest.raises(DataError):
            unpack_arrays(bad)
    with pytest.raises(DataError, match="float16"):
        pack_arrays({"a": np.zeros(2, dtype=np.float16)})


def test_learning_beats_chance_and_clients_are_scored() -> None:
    data = load_digits_data(0)
    population = label_shards(data.targets, 50, 2, 0)
    spec = ModelSpec(architecture=Mlp(sizes=(64, 32, 10)))
    job = FederatedJob(FedAvg(spec, LocalConfig(epochs=2), 20), population, 0)
    run_rounds(job, data.samples(), 60)
    score = evaluate(spec, job.strategy.weights(0), data.test_samples())
    assert score.accuracy > 0.75
    accuracies = client_scores(
        spec, job.strategy.weights(0), data.samples(), population, np.arange(50)
    )
    total = (accuracies * population.counts()).sum() / population.counts().sum()
    whole = evaluate(spec, job.strategy.weights(0), data.samples())
    assert total == pytest.approx(whole.accuracy, abs=1e-6)
