"""Options of the federated core: SCAFFOLD, sketches, simulated devices, calibration, recipes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.calibration import choose, time_rungs
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.devices import DeviceConfig
from raysys.federated.core.engine import ExecutionConfig, FederatedJob
from raysys.federated.core.evaluation import evaluate
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec
from raysys.federated.core.model import EmbeddingBag, Mlp, ModelSpec, macs_per_sample
from raysys.federated.core.partition import iid, label_shards
from raysys.federated.core.population import Availability, Population
from raysys.federated.core.randomness import Purpose, hashed
from raysys.federated.core.recipe import FederatedConfig, ModelConfig, ServerConfig, make_job
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.scaffold import Scaffold
from raysys.federated.core.sketch import sketch_rows
from raysys.federated.core.training import train_task

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 12, 10)))
LOCAL = LocalConfig(epochs=4, batch_size=10, lr=0.1)


@pytest.fixture(scope="module")
def data() -> FederatedData:
    return load_digits_data(0)


def test_scaffold_equals_fedavg_first_then_corrects_drift(data: FederatedData) -> None:
    population = label_shards(data.targets, 20, 2, 0)
    samples = data.samples()
    plain = FederatedJob(FedAvg(SPEC, LOCAL, 20, weighting="uniform"), population, 1)
    scaffold = FederatedJob(Scaffold(SPEC, LOCAL, 20), population, 1)
    run_rounds(plain, samples, 1)
    run_rounds(scaffold, samples, 1)
    np.testing.assert_allclose(plain.strategy.weights(0), scaffold.strategy.weights(0), atol=1e-6)
    controls = scaffold.strategy.controls(np.arange(20))
    assert controls is not None
    assert np.abs(controls).max() > 0
    # With everybody taking part the mean of c - c_k is zero: corrections cancel.
    assert np.abs(controls.mean(axis=0)).max() < 1e-5
    run_rounds(plain, samples, 25)
    run_rounds(scaffold, samples, 25)
    spread = [evaluate(SPEC, j.strategy.weights(0), samples).loss for j in (scaffold, plain)]
    assert spread[0] < spread[1]  # less drift on two-class clients


def test_scaffold_control_by_hand(data: FederatedData) -> None:
    """Option II: after the first round c_k is the mean gradient (w - w_k) / (steps * lr)."""
    population = iid(len(data.targets), 30, 0)
    job = FederatedJob(Scaffold(SPEC, LOCAL, 3), population, 1)
    start = job.strategy.weights(0).copy()
    opened = job.open_round()
    group = opened.groups[0]
    client = group.tasks[0].clients[:1]
    alone = dataclasses.replace(group.tasks[0], clients=client, rows=np.zeros(1, dtype=np.int64))
    partial = train_task(alone, start[None], data.samples(), population, group.controls[:1])
    steps = int(LOCAL.steps_of(population.counts(client))[0])
    expected = -partial.sum_delta[0] / (steps * LOCAL.lr)
    assert partial.controls is not None
    np.testing.assert_allclose(partial.controls[0], expected, rtol=1e-4, atol=1e-6)


def test_scaffold_resumes_and_refuses_momentum(data: FederatedData) -> None:
    population = iid(len(data.targets), 30, 0)
    whole = FederatedJob(Scaffold(SPEC, LOCAL, 10), population, 1)
    run_rounds(whole, data.samples(), 4)
    first = FederatedJob(Scaffold(SPEC, LOCAL, 10), population, 1)
    run_rounds(first, data.samples(), 2)
    second = FederatedJob(Scaffold(SPEC, LOCAL, 10), population, 1)
    second.load(first.state())
    run_rounds(second, data.samples(), 4)
    assert np.array_equal(second.strategy.weights(0), whole.strategy.weights(0))
    with pytest.raises(ConfigError, match="momentum"):
        Scaffold(SPEC, LocalConfig(momentum=0.9), 10)


def test_sketches_keep_inner_products() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 3000)).astype(np.float32)
    rows[1] = rows[0] * 0.5 + rows[1] * 0.5
    sketch = sketch_rows(rows, 512, 3, seed=1)
    assert sketch.shape == (40, 512)
    ratio = (sketch**2).sum(axis=1) / (rows**2).sum(axis=1)
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    assert ratio.std() < 2 * np.sqrt(2 / 512)
    assert sketch[0] @ sketch[1] == pytest.approx(rows[0] @ rows[1], rel=0.2)
    assert np.array_equal(sketch, sketch_rows(rows, 512, 3, seed=1))
    assert not np.array_equal(sketch, sketch_rows(rows, 512, 3, seed=2))


def test_a_strategy_that_asks_gets_sketches_of_the_updates(data: FederatedData) -> None:
    population = iid(len(data.targets), 30, 0)
    job = FederatedJob(FedAvg(SPEC, LOCAL, 8), population, 1, ExecutionConfig(task_clients=3))
    job.strategy._feedback = FeedbackSpec(sketch_dim=32)  # type: ignore[attr-defined]
    report = run_rounds(job, data.samples(), 1)[0]
    assert report.table.sketch is not None
    assert report.table.sketch.shape == (8, 32)
    norms = np.linalg.norm(report.table.sketch, axis=1) / report.table.norm
    assert np.abs(norms - 1).max() < 1


def with_devices(population: Population, seed: int = 0) -> Population:
    rng = np.random.default_rng(seed)
    n = population.n_clients
    return dataclasses.replace(
        population, rate_mac_s=rng.lognormal(18, 1, n), bandwidth_bytes_s=rng.lognormal(13, 1, n)
    )


def test_overcommit_takes_the_fastest_and_reports_the_bias(data: FederatedData) -> None:
    population = with_devices(iid(len(data.targets), 60, 0))
    config = DeviceConfig(overcommit=2.0, failure_rate=0.2)
    job = FederatedJob(FedAvg(SPEC, LOCAL, 15), population, 1, devices=config)
    reports = run_rounds(job, data.samples(), 6)
    for report in reports:
        assert report.counts["ok"] == 15
        assert report.counts["late"] + report.counts["failed"] == 15
        assert report.virtual_s > 0
    assert sum(report.counts["failed"] for report in reports) > 0
    assert np.mean([report.capacity_bias for report in reports]) > 1
    assert job.virtual_s == pytest.approx(sum(report.virtual_s for report in reports))


def test_deadline_ends_a_round_and_too_few_answers_repeat_it(data: FederatedData) -> None:
    population = with_devices(iid(len(data.targets), 60, 0))
    free = FederatedJob(FedAvg(SPEC, LOCAL, 20), population, 1)
    slowest = run_rounds(free, data.samples(), 1)[0].virtual_s
    strict = DeviceConfig(deadline_s=slowest * 1e-6)
    job = FederatedJob(FedAvg(SPEC, LOCAL, 20), population, 1, devices=strict)
    with pytest.raises(InfeasibleError, match="0 of 20"):
        run_rounds(job, data.samples(), 1)


def test_only_available_devices_are_selected(data: FederatedData) -> None:
    n = 40
    base = iid(len(data.targets), n, 0)
    here = np.arange(n) < 12
    population = dataclasses.replace(
        base,
        availability=Availability(
            offsets=np.arange(n + 1),
            start_s=np.where(here, 0.0, 500.0),
            end_s=np.where(here, 100.0, 600.0),
        ),
    )
    job = FederatedJob(FedAvg(SPEC, LOCAL, 10), population, 1)
    report = run_rounds(job, data.samples(), 1)[0]
    assert report.table.clients.max() < 12
    with pytest.raises(InfeasibleError, match="only 12"):
        FederatedJob(FedAvg(SPEC, LOCAL, 13), population, 1).open_round()


def test_calibration_picks_the_fastest_by_the_given_clock(data: FederatedData) -> None:
    population = iid(len(data.targets), 30, 0)
    job = FederatedJob(FedAvg(SPEC, LOCAL, 8), population, 1)
    task = job.open_round().groups[0].tasks[0]
    durations = iter([9.0, 1, 1, 1, 9, 4, 4, 4, 9, 2, 2, 2])
    state = {"now": 0.0, "calls": 0}

    def clock() -> float:
        state["calls"] += 1
        if state["calls"] % 2 == 0:
            state["now"] += next(durations)
        return state["now"]

    speed = time_rungs(task, job.strategy.weights(0), data.samples(), population, clock)
    assert speed == {"batched": 8.0, "vmap": 2.0, "loop": 4.0}
    chosen = choose(speed, ExecutionConfig(deterministic=False), 100, 2)
    assert (chosen.rung, chosen.task_clients, chosen.chunk_size) == ("batched", 2, 2)
    quick = choose({"vmap": 1e6}, ExecutionConfig(deterministic=False), 100, 2)
    assert quick.task_clients == 25


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "qfedavg", "scaffold"])
def test_every_server_of_the_recipe_learns(data: FederatedData, name: str) -> None:
    eta = {"fedavgm": 0.3, "fedadam": 0.03, "fedyogi": 0.03}.get(name)
    config = FederatedConfig(
        clients_per_round=10,
        model=ModelConfig(hidden=(12,)),
        server=ServerConfig(name=name, eta=eta, q=0.5),
        local=LocalConfig(epochs=2),
    )
    spec = config.model.spec(data)
    job = make_job(config, spec, iid(len(data.targets), 30, 0))
    before = evaluate(spec, job.strategy.weights(0), data.test_samples()).loss
    run_rounds(job, data.samples(), 25)
    after = evaluate(spec, job.strategy.weights(0), data.test_samples())
    assert after.loss < 0.8 * before


def test_linear_and_regression_models_from_a_recipe() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 5)).astype(np.float32)
    y = x @ np.array([[1.0], [-2.0], [0.5], [0.0], [3.0]], dtype=np.float32)
    data = FederatedData(name="line", inputs=x, targets=y, test_inputs=x, test_targets=y, classes=0)
    config = FederatedConfig(
        clients_per_round=5, model=ModelConfig(kind="linear"), local=LocalConfig(lr=0.05)
    )
    spec = config.model.spec(data)
    job = make_job(config, spec, iid(300, 10, 0))
    run_rounds(job, data.samples(), 40)
    score = evaluate(spec, job.strategy.weights(0), data.test_samples())
    assert score.loss < 1e-3
    assert np.isnan(score.accuracy)
    with pytest.raises(ConfigError, match="cnn"):
        ModelConfig(kind="cnn").spec(data)


def test_macs_are_counted_and_hashes_are_keyed() -> None:
    data = load_digits_data(0)
    assert macs_per_sample(SPEC, data.samples().inputs[:1]) == 64 * 12 + 12 * 10
    spec = ModelSpec(architecture=EmbeddingBag(vocabulary=10, dim=4, classes=3))
    import torch

    assert macs_per_sample(spec, torch.zeros(1, 5, dtype=torch.int64)) == 12
    one = hashed(1, Purpose.SCHEDULE, np.arange(1000))
    assert len(np.unique(one)) == 1000
    assert abs(float((one >> np.uint64(63)).mean()) - 0.5) < 0.06
    assert not np.array_equal(one, hashed(2, Purpose.SCHEDULE, np.arange(1000)))
