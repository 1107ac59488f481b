"""Robust rules, differential privacy, asynchronous buffers, trees of sums, ensemble variants."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.federated.core.combining import combine_sums, split_sums, spread_block
from raysys.federated.core.evaluation import evaluate
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.fedbuff import AsyncConfig, FedBuff
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec
from raysys.federated.core.privacy import PrivacyConfig, PrivateAvg, spent_epsilon
from raysys.federated.core.recipe import (
    DeviceConfig,
    FederatedConfig,
    ModelConfig,
    load_data,
    make_job,
    make_population,
)
from raysys.federated.core.robust import RobustConfig, centre
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.training import train_task
from raysys.federated.fed_ensemble.distillation import DistillConfig, distil
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.fedbe import FedBe
from raysys.federated.fed_ensemble.prediction import predict_values, softmax
from raysys.federated.fed_ensemble.stacking import Stack, stack_gradient, stack_step

MODEL = ModelConfig(hidden=(8,))
DATA = load_data(FederatedConfig().data, 0, None)


def job_of(**changes: Any) -> Any:
    recipe = FederatedConfig(seed=2, model=MODEL, **changes)
    return make_job(recipe, MODEL.spec(DATA), make_population(recipe, DATA))


def accuracy(job: Any) -> float:
    spec = job.strategy.model_spec(0)
    return evaluate(spec, job.strategy.weights(0), DATA.test_samples()).accuracy


def test_centres_by_hand_and_against_liars() -> None:
    updates = np.array([[1, 5], [2, 6], [3, 7], [1000, -1000]], dtype=np.float32)
    assert centre(updates, RobustConfig()).tolist() == [2.5, 5.5]
    trimmed = RobustConfig(rule="trimmed_mean", trim=0.25)
    assert centre(updates, trimmed).tolist() == [2.5, 5.5]
    with pytest.raises(ConfigError):
        centre(updates[:0], trimmed)


@settings(max_examples=10)
@given(st.permutations(range(7)))
def test_robust_centres_do_not_depend_on_order(order: list[int]) -> None:
    updates = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    for config in (RobustConfig(), RobustConfig(rule="trimmed_mean", trim=0.2)):
        assert np.allclose(centre(updates, config), centre(updates[order], config))


def test_groups_of_updates_are_their_weighted_means() -> None:
    job = job_of()
    group = job.open_round().groups[0]
    single, grouped = (
        train_task(
            dataclasses.replace(group.tasks[0], feedback=FeedbackSpec(update_group=size)),
            group.weights, DATA.samples(), job.population,
        )
        for size in (1, 6)
    )  # fmt: skip
    assert single.updates is not None
    assert grouped.updates is not None
    assert grouped.updates.shape[0] == 4
    expected = np.average(single.updates[:6], axis=0, weights=single.n_samples[:6])
    assert np.allclose(grouped.updates[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"robust": RobustConfig(rule="trimmed_mean", group=2)},
        {"privacy": PrivacyConfig(noise_multiplier=1.0)},
        {"privacy": PrivacyConfig(mode="local", noise_multiplier=0.01)},
        {"asynchronous": AsyncConfig(concurrency=30), "devices": DeviceConfig(failure_rate=0.1)},
    ],
    ids=["robust", "central", "local", "async"],
)
def test_guarded_jobs_learn_and_resume_exactly(changes: dict[str, Any]) -> None:
    samples, whole, halves = DATA.samples(), job_of(**changes), job_of(**changes)
    start = accuracy(whole)
    run_rounds(whole, samples, 12)
    run_rounds(halves, samples, 5)
    saved = unpack_arrays(pack_arrays(halves.state()))
    resumed = job_of(**changes)
    resumed.load(saved)
    run_rounds(resumed, samples, 12)
    assert np.array_equal(whole.strategy.weights(0), resumed.strategy.weights(0))
    assert accuracy(whole) > start
    with pytest.raises(ConfigError):
        job_of().strategy.load({})


def test_privacy_guarantees_follow_the_accountant() -> None:
    # One Gaussian release with sensitivity 1 and deviation 1 at delta 1e-5: Balle and Wang 2018.
    assert spent_epsilon("central", 1.0, 1e-5, 1.0, 1) == pytest.approx(4.377, abs=0.01)
    assert spent_epsilon("local", 2.0, 1e-5, 1.0, 1) == pytest.approx(4.377, abs=0.01)
    assert spent_epsilon("central", 1.0, 1e-5, 0.1, 10) < spent_epsilon(
        "central", 1.0, 1e-5, 0.2, 10
    )
    target = PrivacyConfig(epsilon=2.0, rounds=10, mode="local")
    assert 1.5 < spent_epsilon("local", target.multiplier(1.0), 1e-5, 1.0, 10) <= 2.0
    job = job_of(privacy=PrivacyConfig(noise_multiplier=1.0, clip_norm=0.1))
    reports = run_rounds(job, DATA.samples(), 30)
    assert isinstance(job.strategy, PrivateAvg)
    found = job.strategy.guarantee()
    assert (found.steps, found.mode) == (30, "central")
    assert found.epsilon == pytest.approx(spent_epsilon("central", 1.0, 1e-5, 0.2, 30))
    sizes = [report.counts["ok"] for report in reports]
    assert min(sizes) < 20 < max(sizes)  # clients join independently


def test_privacy_refuses_what_would_break_it() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        PrivacyConfig()
    private = PrivacyConfig(noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="overcommit"):
        job_of(privacy=private, devices=DeviceConfig(overcommit=1.5))
    with pytest.raises(ConfigError, match="one of"):
        job_of(privacy=private, robust=RobustConfig())
    job = job_of(privacy=private)
    assert job.screen.reject_factor is None  # no decision by other clients' updates
    assert job.screen.min_fraction == 0.0
    other = job_of(privacy=PrivacyConfig(noise_multiplier=2.0))
    with pytest.raises(ConfigError, match="noise_multiplier"):
        other.load(job.state())


def test_central_noise_has_the_stated_deviation() -> None:
    job = job_of(privacy=PrivacyConfig(noise_multiplier=300.0, clip_norm=1.0))
    start = job.strategy.weights(0)
    run_rounds(job, DATA.samples(), 1)
    assert np.std(job.strategy.weights(0) - start) * 20 == pytest.approx(300, rel=0.1)


def test_asynchronous_answers_are_stale_and_weighted() -> None:
    job = job_of(asynchronous=AsyncConfig(concurrency=60, jitter=1.0))
    reports = run_rounds(job, DATA.samples(), 15)
    assert isinstance(job.strategy, FedBuff)
    assert max(job.strategy.staleness) >= 2
    assert all(report.counts["ok"] == 20 for report in reports)
    assert job.virtual_s > 0
    with pytest.raises(ConfigError, match="concurrency"):
        job_of(asynchronous=AsyncConfig(concurrency=10**6))


def test_trees_of_sums_equal_one_sum() -> None:
    recipe = FederatedConfig(seed=2, model=MODEL, clients_per_round=60)
    recipe = dataclasses.replace(
        recipe, execution=dataclasses.replace(recipe.execution, task_clients=10)
    )
    results = []
    for block in (1, 4):
        job = make_job(recipe, MODEL.spec(DATA), make_population(recipe, DATA))
        opened = job.open_round()
        group = opened.groups[0]
        parts = [
            split_sums(train_task(task, group.weights, DATA.samples(), job.population))
            for task in group.tasks
        ]
        for at in range(0, len(parts), block):
            headers = [header for header, _ in parts[at : at + block]]
            sums = [own for _, own in parts[at : at + block]]
            total = combine_sums([header.present for header in headers], sums)
            for partial in spread_block(headers, total):
                assert opened.add(0, partial)
        assert job.close_round(opened) is not None
        results.append(job.strategy.weights(0))
    assert np.allclose(*results, atol=1e-7)


def ensemble_of(**changes: Any) -> FedEnsemble:
    spec = MODEL.spec(DATA)
    return FedEnsemble(EnsembleConfig(k=3, **changes), 12, lambda: FedAvg(spec, LocalConfig(), 12))


def test_a_shared_trunk_stays_one_and_heads_differ() -> None:
    recipe = FederatedConfig(seed=2, model=MODEL, clients_per_round=12)
    ensemble = ensemble_of(share="trunk")
    job = make_job(recipe, MODEL.spec(DATA), make_population(recipe, DATA), ensemble)
    before = ensemble.stacked()
    run_rounds(job, DATA.samples(), 4)
    members, trunk = ensemble.stacked(), 64 * 8 + 8
    assert np.array_equal(members[0, :trunk], members[1, :trunk])
    assert not np.array_equal(members[0, :trunk], before[0, :trunk])
    assert not np.array_equal(members[0, trunk:], members[1, trunk:])


def test_a_stack_learns_whom_to_trust() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    good = softmax(4.0 * np.eye(3)[labels] + rng.normal(size=(60, 3)))
    members = np.stack([good, softmax(rng.normal(size=(60, 3)))])
    stack = Stack(np.zeros(2))
    step = 1e-6
    found = stack_gradient(stack, members, labels)
    for axis in range(2):
        moved = Stack(np.eye(2)[axis] * step)
        numeric = (stack_gradient(moved, members, labels).loss - found.loss) / step
        assert found.gradient[axis] == pytest.approx(numeric, rel=1e-3)
    sharper = stack_gradient(Stack(np.zeros(2), step), members, labels)
    assert found.gradient[2] == pytest.approx((sharper.loss - found.loss) / step, rel=1e-3)
    for _ in range(50):
        halves = [
            stack_gradient(stack, members[:, part], labels[part])
            for part in (slice(0, 20), slice(20, 60), slice(60, 60))
        ]
        stack = stack_step(stack, halves)
    assert stack.weights[0] > 0.8
    assert stack_gradient(stack, members, labels).loss < found.loss
    with pytest.raises(ConfigError):
        stack_step(stack, [stack_gradient(stack, members[:, :0], labels[:0])])


def test_students_and_fedbe() -> None:
    spec = MODEL.spec(DATA)
    recipe = FederatedConfig(seed=2, model=MODEL, clients_per_round=12)
    strategy = FedBe(spec, LocalConfig(), 12, DATA.inputs[:100], draws=2)
    run_rounds(make_job(recipe, spec, make_population(recipe, DATA), strategy), DATA.samples(), 2)
    assert strategy.stacked().shape[0] == 1 + 12 + 2
    soft = np.eye(10)[DATA.targets[:200]]
    config = DistillConfig(epochs=20)
    student = distil(spec, strategy.weights(0), DATA.inputs[:200], soft, config)
    assert evaluate(spec, student, DATA.test_samples()).accuracy > 0.6
    with pytest.raises(ConfigError):
        distil(spec, student, DATA.inputs[:3], soft)


def test_regression_members_give_mean_and_spread() -> None:
    values = np.array([[[1.0]], [[3.0]]], dtype=np.float32)
    mean, spread = predict_values(values)
    assert (mean[0, 0], spread[0, 0]) == (2.0, 1.0)
    mean, spread = predict_values(values, np.array([1.0, 0.0]), noise_variance=4.0)
    assert (mean[0, 0], spread[0, 0]) == (1.0, 2.0)
