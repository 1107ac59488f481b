"""Fed-ensemble: exact coverage, the K = 1 identity, uncertainty, calibration, theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import evaluate, outputs
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.partition import label_shards
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.server import Adam
from raysys.federated.core.training import Samples
from raysys.federated.fed_ensemble.baselines import Snapshots, WeightAverage, fedbe_members
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.prediction import (
    TEMPERATURES,
    auroc,
    brier,
    expected_calibration_error,
    fit_temperature,
    loss_by_temperature,
    nll,
    personal_weights,
    predict,
    predict_values,
    risk_coverage_area,
    sharpen,
    softmax,
)
from raysys.federated.fed_ensemble.schedule import PermutationSchedule

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 12, 10)))
LOCAL = LocalConfig(batch_size=10, lr=0.1)


def digits_job(k: int, per_round: int = 20, **changes: object) -> tuple[FederatedJob, FedEnsemble]:
    data = load_digits_data(0)
    population = label_shards(data.targets, 40, 2, 0)
    config = EnsembleConfig(k=k, **changes)  # type: ignore[arg-type]
    strategy = FedEnsemble(config, per_round, lambda: FedAvg(SPEC, LOCAL, per_round))
    return FederatedJob(strategy, population, 5), strategy


@given(st.integers(1, 5), st.integers(0, 99), st.lists(st.tuples(st.integers(0, 7), st.booleans())))
@settings(max_examples=40, deadline=None)
def test_every_age_of_a_client_visits_every_model_once(
    k: int, seed: int, arrivals: list[tuple[int, bool]]
) -> None:
    schedule = PermutationSchedule(k, 8, seed)
    history: dict[int, list[int]] = {}
    for round_id, (client, answers) in enumerate([*arrivals, *[(c, True) for c in range(8)] * k]):
        counts = np.zeros(k, dtype=np.int64)
        model = int(schedule.place(np.array([client]), round_id, counts)[0])
        assert counts.sum() == 1
        if answers:  # a client that vanished gets the same model again
            schedule.accept(np.array([client]))
            history.setdefault(client, []).append(model)
        else:
            assert schedule.next_model(client) == model
    for models in history.values():
        for start in range(0, len(models) - k + 1, k):
            assert sorted(models[start : start + k]) == list(range(k))


@given(st.integers(2, 5), st.integers(0, 200), st.integers(8, 40))
@settings(max_examples=30, deadline=None)
def test_balance_keeps_coverage_exact(k: int, seed: int, per_round: int) -> None:
    schedule = PermutationSchedule(k, 40, seed)
    rng = np.random.default_rng(seed)
    seen = np.zeros((40, k), dtype=np.int64)
    for round_id in range(4 * k):
        clients = rng.choice(40, per_round, replace=False)
        counts = np.zeros(k, dtype=np.int64)
        models = schedule.place(clients, round_id, counts)
        assert np.array_equal(counts, np.bincount(models, minlength=k))
        schedule.accept(clients)
        seen[clients, models] += 1
        schedule.close_round(counts)
    assert (seen.max(axis=1) - seen.min(axis=1)).max() <= 1


def test_group_strata_follow_the_paper_and_random_does_not() -> None:
    groups = PermutationSchedule(3, 60, 1, strata=5)
    for age in range(3):
        for client in range(60):
            models = [groups.next_model(client, 3 * age + r) for r in range(3)]
            assert sorted(models) == [0, 1, 2]
    assert len({groups.stratum(c) for c in range(60)}) == 5
    random = PermutationSchedule(3, 60, 1, strata="random")
    ages = [sorted(random.next_model(c, r) for r in range(3)) for c in range(60)]
    assert any(age != [0, 1, 2] for age in ages)


def test_schedule_survives_a_checkpoint_and_refuses_another_k() -> None:
    one = PermutationSchedule(3, 20, 2)
    clients = np.arange(20)
    for round_id in range(4):
        counts = np.zeros(3, dtype=np.int64)
        one.place(clients, round_id, counts)
        one.accept(clients)
    two = PermutationSchedule(3, 20, 2)
    two.load(one.state())
    assert [two.next_model(c) for c in range(20)] == [one.next_model(c) for c in range(20)]
    with pytest.raises(ConfigError, match="checkpoint"):
        PermutationSchedule(4, 20, 2).load(one.state())


def test_a_lost_counter_costs_two_updates_of_coverage_at_most() -> None:
    clients, seen = np.arange(20), np.zeros((20, 4), dtype=np.int64)
    schedule = PermutationSchedule(4, 20, 2)
    for round_id in range(11):
        if round_id == 6:  # in the middle of an age
            schedule = PermutationSchedule(4, 20, 3)
        models = schedule.place(clients, round_id, np.zeros(4, dtype=np.int64))
        schedule.accept(clients)
        seen[clients, models] += 1
    assert (seen.max(axis=1) - seen.min(axis=1)).max() <= 2


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 9}, {"strata": 0}, {"strata": "all"}])
def test_bad_schedules_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PermutationSchedule(**{"k": 2, "n_clients": 8, "seed": 0, **bad})  # type: ignore[arg-type]


def test_one_model_is_fedavg_bit_for_bit() -> None:
    data = load_digits_data(0)
    job, _ = digits_job(1)
    plain = FederatedJob(FedAvg(SPEC, LOCAL, 20), job.population, 5)
    run_rounds(job, data.samples(), 5)
    run_rounds(plain, data.samples(), 5)
    assert np.array_equal(job.strategy.weights(0), plain.strategy.weights(0))


def test_fused_round_equals_training_each_model_by_itself() -> None:
    data = load_digits_data(0)
    job, ensemble = digits_job(3)
    start = ensemble.stacked()
    opened = job.open_round()
    group = opened.groups[0]
    placed = {int(c): group.model_ids[r] for c, r in zip(group.clients, group.rows)}
    run_rounds(job, data.samples(), 1)
    assert len(opened.groups) == 1
    for k in range(3):
        own = np.array(sorted(c for c, model in placed.items() if model == k))
        alone = FederatedJob(FedAvg(SPEC, LOCAL, len(own)), job.population, 5)
        alone.strategy.load({"weights": start[k], "version": np.array([0])})
        alone._group = lambda _, own=own, a=alone: FederatedJob._group(a, own)  # type: ignore[method-assign]
        run_rounds(alone, data.samples(), 1)
        np.testing.assert_allclose(alone.strategy.weights(0), ensemble.weights(k), atol=1e-6)


def test_coverage_is_exact_when_updates_are_dropped() -> None:
    data = load_digits_data(0)
    samples = data.samples()
    job, ensemble = digits_job(3, per_round=30)
    bad = job.population.samples(7)
    samples.inputs[bad.astype(np.int64)] = float("inf")  # client 7 never delivers
    job.screen = ScreenConfig(min_fraction=0.5)
    run_rounds(job, samples, 12)
    coverage = ensemble.coverage()
    assert coverage[7].sum() == 0
    assert (coverage.max(axis=1) - coverage.min(axis=1)).max() <= 1
    assert coverage.sum() > 300


def test_ensemble_resumes_exactly_and_refuses_another_k() -> None:
    data = load_digits_data(0)
    whole, strategy = digits_job(3)
    run_rounds(whole, data.samples(), 6)
    first, _ = digits_job(3)
    run_rounds(first, data.samples(), 2)
    second, resumed = digits_job(3)
    second.load(first.state())
    run_rounds(second, data.samples(), 6)
    assert np.array_equal(resumed.stacked(), strategy.stacked())
    assert np.array_equal(resumed.coverage(), strategy.coverage())
    other, _ = digits_job(4)
    with pytest.raises(ConfigError, match="checkpoint's K 3"):
        other.load(first.state())


def test_members_differ_moments_are_their_own_and_a_broken_one_is_replaced() -> None:
    data = load_digits_data(0)
    population = label_shards(data.targets, 40, 2, 0)
    ensemble = FedEnsemble(EnsembleConfig(k=3), 20, lambda: FedAvg(SPEC, LOCAL, 20, Adam()))
    job = FederatedJob(ensemble, population, 0)
    run_rounds(job, data.samples(), 2)
    assert ensemble.diversity() > 0.1
    assert len({id(line.server) for line in ensemble.lines}) == 3
    ensemble.lines[1].reset(np.full_like(ensemble.weights(1), np.nan))
    run_rounds(job, data.samples(), 3)
    assert np.isfinite(ensemble.stacked()).all()
    assert [member for _, member in ensemble.replaced] == [1]
    with pytest.raises(ConfigError, match="different"):
        EnsembleConfig(k=2, members=(4, 4))


def test_warm_start_branches_from_one_model() -> None:
    data = load_digits_data(0)
    job, ensemble = digits_job(3, warm_rounds=2)
    run_rounds(job, data.samples(), 2)
    stacked = ensemble.stacked()
    gaps = np.linalg.norm(stacked[1:] - stacked[0], axis=1) / np.linalg.norm(stacked[0])
    assert ((gaps > 0.01) & (gaps < 0.3)).all()
    assert ensemble.coverage().sum() == 0


def test_uncertainty_by_hand() -> None:
    agree = np.log(np.array([[[0.9, 0.1]], [[0.9, 0.1]]], dtype=np.float32))
    differ = np.log(np.array([[[0.9, 0.1]], [[0.1, 0.9]]], dtype=np.float32))
    one, two = predict(agree), predict(differ)
    assert one.mutual_information[0] == pytest.approx(0, abs=1e-6)
    assert two.probabilities[0] == pytest.approx([0.5, 0.5], abs=1e-6)
    own = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert two.mutual_information[0] == pytest.approx(np.log(2) - own, abs=1e-6)
    assert (one.label_disagreement, two.label_disagreement) == (0.0, 1.0)
    assert predict(differ, np.array([1.0, 0.0])).labels[0] == 0
    assert predict(differ, combine="vote").probabilities[0] == pytest.approx([0.5, 0.5])
    assert predict(differ, combine="logits").probabilities[0] == pytest.approx([0.5, 0.5])
    broken = differ.copy()
    broken[1] = np.nan
    assert predict(broken).probabilities[0] == pytest.approx([0.9, 0.1], abs=1e-6)
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0]):
        with pytest.raises(ConfigError, match="weights"):
            predict(differ, np.array(weights))
    with pytest.raises(ConfigError, match="finite"):
        predict(np.full_like(differ, np.nan))


def test_scores_by_hand() -> None:
    p, y = np.array([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 0])
    assert nll(p, y) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert brier(p, y) == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)
    assert expected_calibration_error(p, y) == pytest.approx((0.2 + 0.6) / 2)
    assert auroc(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx(3.5 / 4)
    assert risk_coverage_area(np.array([0.1, 0.9]), np.array([False, True])) == pytest.approx(0.25)
    with pytest.raises(ConfigError):
        auroc(np.array([]), np.array([1.0]))
    for scored in (nll, brier, expected_calibration_error):
        for bad in (np.array([0, 2]), np.array([-1, 0]), np.array([0])):
            with pytest.raises(ConfigError, match="labels"):
                scored(p, bad)
        with pytest.raises(ConfigError, match="sum to 1"):
            scored(2 * p, y)


def test_temperature_finds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    true = softmax(rng.standard_normal((4000, 5)) * 2)
    labels = np.array([rng.choice(5, p=row) for row in true])
    clients = np.array_split(np.arange(4000), 13)
    flat = sharpen(true, 2.0)  # under-confident
    total = np.sum([loss_by_temperature(flat[c], labels[c]) for c in clients], axis=0)
    found = fit_temperature(total, 4000, 5)
    assert found == pytest.approx(0.5, rel=0.1)
    assert nll(sharpen(flat, found), labels) < nll(flat, labels)
    for bad in ((total, 0, 5), (total, 10, 1), (total[:3], 10, 2)):
        with pytest.raises(ConfigError):
            fit_temperature(*bad)
    assert len(TEMPERATURES) == 8


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_personal_weights_are_a_distribution(n: int, k: int, seed: int) -> None:
    losses = np.random.default_rng(seed).exponential(1.0, (n, k))
    weights = personal_weights(losses)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    if n == 0:
        assert weights == pytest.approx(1 / k)


def test_personal_weights_prefer_the_better_member() -> None:
    losses = np.tile([0.1, 2.0, 2.0], (20, 1))
    weights = personal_weights(losses)
    assert weights[0] > 0.8
    assert personal_weights(losses, lam=1.0) == pytest.approx(1 / 3)
    diverged = np.tile([np.nan, 0.5, 2.0], (20, 1))
    assert np.argmax(personal_weights(diverged)) == 1
    assert personal_weights(diverged).sum() == pytest.approx(1)


def test_ensemble_mean_of_linear_models_meets_the_posterior_mean_as_one_over_k() -> None:
    """Over-parameterised linear models: limits are a Gaussian posterior's samples."""
    rng = np.random.default_rng(0)
    x, x_new = rng.standard_normal((10, 40)), rng.standard_normal((200, 40))
    y = rng.standard_normal(10)
    inverse = np.linalg.pinv(x)
    posterior_mean = x_new @ inverse @ y
    start = rng.standard_normal((2000, 40))
    limits = start + (y - start @ x.T) @ inverse.T  # gradient descent to convergence
    descended = start[0].copy()
    for _ in range(4000):
        descended -= 0.01 * (descended @ x.T - y) @ x
    assert np.allclose(descended, limits[0], atol=1e-6)
    sizes = np.array([1, 2, 4, 8, 16])
    errors = [
        np.mean([((limits[i : i + k].mean(axis=0) @ x_new.T - posterior_mean) ** 2).mean()
                 for i in range(0, 1600, k)])
        for k in sizes
    ]  # fmt: skip
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)


def test_members_agree_where_the_data_is_and_spread_where_it_is_not() -> None:
    """Regression on a noisy sine, clients split by x."""
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(-2, 2, 240)).astype(np.float32)[:, None]
    y = np.sin(2 * x) + 0.1 * rng.standard_normal((240, 1), dtype=np.float32)
    population = Population(
        offsets=np.arange(0, 241, 12), sample_ids=np.arange(240, dtype=np.int32)
    )
    spec = ModelSpec(architecture=Mlp(sizes=(1, 32, 1)), task="regression")
    local = LocalConfig(epochs=5, batch_size=12, lr=0.05)
    ensemble = FedEnsemble(EnsembleConfig(k=4), 20, lambda: FedAvg(spec, local, 20))
    job = FederatedJob(ensemble, population, 0)
    run_rounds(job, Samples(torch.from_numpy(x), torch.from_numpy(y)), 80)

    def spread(points: np.ndarray) -> tuple[np.ndarray, float]:
        inputs = torch.from_numpy(points.astype(np.float32)[:, None])
        members = np.stack([outputs(spec, row, inputs).numpy() for row in ensemble.stacked()])
        mean, deviation = predict_values(members)
        return mean[:, 0], float(deviation.mean())

    inside = np.linspace(-1.8, 1.8, 50)
    mean, near = spread(inside)
    assert np.abs(mean - np.sin(2 * inside)).mean() < 0.4
    _, far = spread(np.concatenate([np.linspace(-6, -4, 25), np.linspace(4, 6, 25)]))
    assert far > 2 * near


def test_baselines_by_hand() -> None:
    average, snapshots = WeightAverage(0.5), Snapshots(2, every=2)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        weights = np.array([value], dtype=np.float32)
        average.add(weights)
        snapshots.add(weights)
    expected = sum(v * 0.5 ** (6 - v) for v in range(1, 7)) / sum(0.5**i for i in range(6))
    assert average.weights()[0] == pytest.approx(expected)
    assert snapshots.stacked().ravel().tolist() == [4.0, 6.0]
    members = fedbe_members(
        np.array([[0.0, 2.0], [4.0, 2.0]], dtype=np.float32), np.array([1, 3]), 500, 0
    )
    assert members[0].tolist() == [3.0, 2.0]
    assert members[3:].std(axis=0) == pytest.approx([np.sqrt(3), 0], abs=0.15)
    for make in (lambda: WeightAverage(1.0), lambda: Snapshots(0), lambda: Snapshots(1).stacked()):
        with pytest.raises(ConfigError):
            make()


def test_the_ensemble_beats_its_members() -> None:
    data = load_digits_data(0)
    job, ensemble = digits_job(3, per_round=24)
    run_rounds(job, data.samples(), 45)
    logits = np.stack([
        outputs(SPEC, row, data.test_samples().inputs).numpy() for row in ensemble.stacked()
    ])  # fmt: skip
    together = (predict(logits).labels == data.test_targets).mean()
    alone = [(row.argmax(axis=1) == data.test_targets).mean() for row in logits]
    assert together > np.mean(alone)
    score = evaluate(SPEC, ensemble.stacked(), data.test_samples())
    assert score.accuracy == pytest.approx(together)
    assert score.loss == pytest.approx(
        nll(predict(logits).probabilities, data.test_targets), rel=1e-4
    )
