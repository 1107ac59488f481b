"""Fed-ensemble under differential privacy and with asynchronous clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.federated.ensemble import build_ensemble
from raysys.errors import ConfigError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import evaluate
from raysys.federated.core.fedbuff import AsyncConfig
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.privacy import PrivacyConfig, spent_epsilon
from raysys.federated.core.recipe import (
    DeviceConfig,
    FederatedConfig,
    ModelConfig,
    ServerConfig,
    load_data,
    make_job,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.fed_ensemble.buffered import BufferedEnsemble
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble

MODEL = ModelConfig(hidden=(8,))
DATA = load_data(FederatedConfig().data, 0, None)
CENTRAL = {"privacy": PrivacyConfig(noise_multiplier=1.0)}
LOCAL = {"privacy": PrivacyConfig(mode="local", noise_multiplier=0.01)}
ASYNC = {"asynchronous": AsyncConfig(concurrency=30, jitter=1.0)}


def recipe_of(**changes: Any) -> FederatedConfig:
    return FederatedConfig(
        seed=2, model=MODEL, partition=PartitionConfig(clients=60), clients_per_round=20, **changes
    )


def ensemble_job(k: int, ensemble: dict[str, Any] | None = None, **changes: Any) -> FederatedJob:
    recipe = recipe_of(**changes)
    config = EnsembleConfig(k=k, **(ensemble or {}))
    return build_ensemble(recipe, config, MODEL.spec(DATA), make_population(recipe, DATA))


def line_job(**changes: Any) -> FederatedJob:
    recipe = recipe_of(**changes)
    return make_job(recipe, MODEL.spec(DATA), make_population(recipe, DATA))


@pytest.mark.parametrize("changes", [CENTRAL, LOCAL, ASYNC], ids=["central", "local", "async"])
def test_one_model_is_the_line_itself_and_three_resume_exactly(changes: dict[str, Any]) -> None:
    samples = DATA.samples()
    one, line = ensemble_job(1, **changes), line_job(**changes)
    for job in (one, line):
        run_rounds(job, samples, 4)
    assert np.array_equal(one.strategy.weights(0), line.strategy.weights(0))
    whole, half, resumed = (ensemble_job(3, **changes) for _ in range(3))
    run_rounds(whole, samples, 9)
    run_rounds(half, samples, 4)
    resumed.load(unpack_arrays(pack_arrays(half.state())))
    run_rounds(resumed, samples, 9)
    for member in range(3):
        assert np.array_equal(whole.strategy.weights(member), resumed.strategy.weights(member))
    assert isinstance(whole.strategy, FedEnsemble)
    coverage = whole.strategy.coverage()
    assert (coverage.max(axis=1) - coverage.min(axis=1)).max() <= 1


def test_three_private_models_cost_the_privacy_of_one() -> None:
    job = ensemble_job(3, **CENTRAL)
    reports = run_rounds(job, DATA.samples(), 6)
    assert isinstance(job.strategy, FedEnsemble)
    found = job.strategy.guarantee()
    assert found is not None
    assert found.epsilon == pytest.approx(spent_epsilon("central", 1.0, 1e-5, 20 / 60, 6))
    assert len({report.counts["ok"] for report in reports}) > 1  # clients join independently
    plain = ensemble_job(3)
    assert isinstance(plain.strategy, FedEnsemble)
    assert plain.strategy.guarantee() is None


def test_members_get_noise_of_their_own_and_of_the_stated_size() -> None:
    job = ensemble_job(3, privacy=PrivacyConfig(noise_multiplier=300.0))
    before = [job.strategy.weights(member) for member in range(3)]
    run_rounds(job, DATA.samples(), 1)
    moved = np.stack([job.strategy.weights(m) - before[m] for m in range(3)])
    assert moved.std(axis=1) * 20 / 3 == pytest.approx(np.full(3, 300), rel=0.15)
    assert np.abs(np.corrcoef(moved) - np.eye(3)).max() < 0.2


def test_under_central_privacy_nobody_moves_another_clients_model() -> None:
    job = ensemble_job(3, **CENTRAL)
    assert isinstance(job.strategy, FedEnsemble)
    clients = np.arange(60)
    together = job.strategy.schedule.place(clients, 0, np.zeros(3, dtype=np.int64))
    alone = [
        int(job.strategy.schedule.place(clients[c : c + 1], 0, np.array([0, 9, 9]))[0])
        for c in range(60)
    ]
    assert together.tolist() == alone


def test_asynchronous_members_learn_from_stale_answers() -> None:
    local = LocalConfig(epochs=5, lr=0.2)
    job = ensemble_job(3, **ASYNC, devices=DeviceConfig(failure_rate=0.1), local=local)
    reports = run_rounds(job, DATA.samples(), 30)
    strategy = job.strategy
    assert isinstance(strategy, BufferedEnsemble)
    assert max(strategy.staleness) >= 2
    assert all(report.counts["ok"] == 20 for report in reports)
    spec, test = strategy.model_spec(0), DATA.test_samples()
    accuracies = [evaluate(spec, strategy.weights(m), test).accuracy for m in range(3)]
    assert np.mean(accuracies) > 0.6
    assert min(accuracies) > 0.3
    assert strategy.coverage().sum() == 600


@pytest.mark.parametrize(
    ("changes", "ensemble", "field"),
    [
        (CENTRAL, {"warm_rounds": 3}, "ensemble.warm_rounds"),
        (CENTRAL, {"share": "trunk"}, "ensemble.share"),
        (ASYNC, {"warm_rounds": 3}, "ensemble.warm_rounds"),
        (ASYNC, {"share": "trunk"}, "ensemble.share"),
        ({"asynchronous": AsyncConfig(concurrency=61)}, {}, "asynchronous.concurrency"),
        ({"server": ServerConfig(name="scaffold")}, {}, "recipe.server.name"),
    ],
)
def test_what_does_not_compose_is_refused_by_name(
    changes: dict[str, Any], ensemble: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match=field):
        ensemble_job(3, ensemble, **changes)


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="FedBuff"):
        ensemble_job(3, **ASYNC).strategy.load(ensemble_job(3).strategy.state())
