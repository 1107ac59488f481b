"""The federated core without Ray: populations, splits, exactness, screening, aggregation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.federated.core.aggregation import RoundFold
from raysys.federated.core.batching import cut_chunks, draw_batches
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.engine import ExecutionConfig, FederatedJob
from raysys.federated.core.evaluation import client_scores, evaluate
from raysys.federated.core.fedavg import FedAvg, QFedAvg
from raysys.federated.core.ladder import available_rungs
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, Partial, ScreenConfig, Status, TrainTask
from raysys.federated.core.model import (
    Cnn,
    EmbeddingBag,
    FromFactory,
    Mlp,
    ModelSpec,
    Weights,
    initial_weights,
    layout_of,
    load_flat,
)
from raysys.federated.core.partition import (
    PartitionConfig,
    dirichlet,
    iid,
    label_shards,
    natural,
    partition,
    planted_groups,
)
from raysys.federated.core.population import Availability, Population, population_from_lists
from raysys.federated.core.randomness import KeyedStreams, Purpose
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.server import Adam, Averaging, Momentum, Yogi
from raysys.federated.core.training import Samples, train_task

SMALL = ModelSpec(architecture=Mlp(sizes=(4, 6, 3)))


def small_samples(n: int = 60, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((n, 4), dtype=np.float32)
    return Samples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(0, 3, n)))


def ragged_population(sizes: list[int], n: int = 60, seed: int = 0) -> Population:
    rng = np.random.default_rng(seed)
    return population_from_lists([rng.integers(0, n, size) for size in sizes])


def make_task(clients: list[int], **changes: object) -> TrainTask:
    task = TrainTask(
        round_id=0,
        attempt=0,
        task_id=0,
        spec=SMALL,
        clients=np.array(clients, dtype=np.int64),
        rows=np.zeros(len(clients), dtype=np.int64),
        models=1,
        local=LocalConfig(batch_size=4),
        feedback=FeedbackSpec(),
        seed=7,
        rung="batched",
        chunk_size=50,
    )
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_streams_are_keyed_not_sequential(seed: int, round_id: int, client: int) -> None:
    streams = KeyedStreams(seed, Purpose.BATCHES, round_id)
    first = streams.raw(client, 7)
    streams.raw(client + 1, 3)
    assert (streams.raw(client, 7) == first).all()
    assert (KeyedStreams(seed, Purpose.BATCHES, round_id).raw(client, 5) == first[:5]).all()
    assert (streams.raw(client + 1, 7) != first).any()
    assert (KeyedStreams(seed, Purpose.SELECTION, round_id).raw(client, 7) != first).any()


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.05, 0.3, 5.0]))
@settings(max_examples=25, deadline=None)
def test_every_split_deals_each_sample_once(clients: int, seed: int, alpha: float) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, 200)
    for population in (iid(200, clients, seed), dirichlet(labels, clients, alpha, seed)):
        assert np.array_equal(np.sort(population.sample_ids), np.arange(200))
        sizes = population.counts()
        assert sizes.max() - sizes.min() <= 1
    again = dirichlet(labels, clients, alpha, seed)
    assert np.array_equal(again.sample_ids, population.sample_ids)


def test_shards_give_each_client_its_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    population = label_shards(labels, 50, 2, seed=3)
    kinds = [set(labels[population.samples(c)]) for c in range(50)]
    assert all(len(kind) == 2 for kind in kinds)
    assert np.array_equal(np.sort(population.sample_ids), np.arange(1000))


def test_natural_and_planted_splits() -> None:
    population = natural(np.array(["b", "a", "b", "c"]))
    assert [population.samples(c).tolist() for c in range(3)] == [[1], [0, 2], [3]]
    labels = np.repeat(np.arange(4), 30)
    planted, groups = planted_groups(labels, 6, [[0, 1], [2]], seed=0)
    for client in range(6):
        allowed = {0, 1} if groups[client] == 0 else {2}
        assert set(labels[planted.samples(client)]) <= allowed


def test_bad_splits_are_refused() -> None:
    labels = np.repeat(np.arange(3), 4)
    with pytest.raises(InfeasibleError, match="only 12 samples"):
        iid(12, 13, 0)
    with pytest.raises(InfeasibleError, match="3 classes"):
        label_shards(labels, 2, 4, 0)
    with pytest.raises(ConfigError, match="client keys"):
        partition(labels, PartitionConfig(scheme="natural"), 0)
    with pytest.raises(ConfigError, match="one group only"):
        planted_groups(labels, 2, [[0], [0]], 0)
    with pytest.raises(ConfigError, match="dirichlet"):
        PartitionConfig(scheme="dirichlett")


def test_population_checks() -> None:
    population = ragged_population([3, 0, 2])
    assert population.counts().tolist() == [3, 0, 2]
    for bad in ([0, 0], [3], [-1]):
        with pytest.raises(ConfigError, match="clients"):
            population.check_clients(np.array(bad))
    with pytest.raises(ConfigError, match="at least one client"):
        population_from_lists([])
    with pytest.raises(ConfigError, match="above 0"):
        Population(
            offsets=np.array([0, 1]), sample_ids=np.array([0]), rate_mac_s=np.array([np.nan])
        )
    with pytest.raises(ConfigError, match="rising offsets"):
        Population(offsets=np.array([0, 3]), sample_ids=np.array([0]))


def test_availability_checks() -> None:
    good = Availability(
        offsets=np.array([0, 2, 3]), start_s=np.array([0.0, 5, 1]), end_s=np.array([2.0, 6, 4])
    )
    assert good.available(1.5).tolist() == [True, True]
    assert good.available(3.0).tolist() == [False, True]
    with pytest.raises(ConfigError, match="ends after it starts"):
        dataclasses.replace(good, end_s=np.array([0.0, 6, 4]))
    with pytest.raises(ConfigError, match="apart"):
        dataclasses.replace(good, start_s=np.array([0.0, 1.0, 1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("steps", 0),
        ("epochs", 0),
        ("momentum", 1.0),
        ("batch_size", 0),
    ],
)
def test_local_config_checks(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        LocalConfig(**{field: value})  # type: ignore[arg-type]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 12)
)
@settings(max_examples=40, deadline=None)
def test_chunks_cover_everybody_with_little_padding(
    sizes: list[int], chunk: int, batch: int
) -> None:
    counts = np.array(sizes, dtype=np.int64)
    config = LocalConfig(batch_size=batch)
    chunks = cut_chunks(counts, config, chunk)
    flat = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)
    assert np.array_equal(np.sort(flat), np.flatnonzero(counts))
    for places in chunks:
        assert len(places) <= chunk
        assert (np.diff(config.steps_of(counts[places])) <= 0).all()
        width = np.minimum(counts[places], batch)
        assert len(places) <= 8 or 1 - width.sum() / (width.max() * len(places)) <= 0.1


def test_an_epoch_uses_each_sample_once() -> None:
    population = ragged_population([13, 9, 4])
    config = LocalConfig(epochs=2, batch_size=4)
    batches = draw_batches(
        population, np.array([0, 1, 2]), config, KeyedStreams(0, Purpose.BATCHES)
    )
    assert (
        batches.active == [3, 3, 2, 2, 2, 2, 1, 1][: len(batches.active)] or batches.active[0] == 3
    )
    for client, n in enumerate([13, 9, 4]):
        used = batches.index[:, client][batches.scale[:, client] > 0]
        own = np.sort(np.tile(population.samples(client), 2))
        assert np.array_equal(np.sort(used.numpy()), own)
        steps = 2 * -(-n // 4)
        assert (batches.scale[:steps, client].sum(dim=1) - 1).abs().max() < 1e-6


def test_every_rung_equals_every_other() -> None:
    samples, population = small_samples(), ragged_population([9, 5, 12, 0, 1])
    local = LocalConfig(epochs=3, batch_size=4, momentum=0.5, weight_decay=1e-3, prox_mu=0.1)
    weights = initial_weights(SMALL, 0).values[None]
    found = {
        rung: train_task(
            make_task([0, 1, 2, 3, 4], local=local, rung=rung), weights, samples, population
        )
        for rung in available_rungs(SMALL)
    }
    base = found["loop"]
    assert base.status.tolist() == [0, 0, 0, Status.EMPTY, 0]
    for rung in ("batched", "vmap"):
        gap = np.linalg.norm(found[rung].sum_delta - base.sum_delta) / np.linalg.norm(
            base.sum_delta
        )
        assert gap < 1e-5
        np.testing.assert_allclose(found[rung].loss_last, base.loss_last, rtol=1e-4)
        np.testing.assert_allclose(found[rung].loss_first, base.loss_first, rtol=1e-4)


def test_cnn_and_factory_modules_train_on_both_general_rungs() -> None:
    rng = np.random.default_rng(0)
    samples = Samples(
        torch.from_numpy(rng.standard_normal((30, 1, 8, 8), dtype=np.float32)),
        torch.from_numpy(rng.integers(0, 3, 30)),
    )
    population = ragged_population([6, 4], n=30)
    factory = FromFactory(
        factory="torch.nn:LSTM", arguments=(("input_size", 2), ("hidden_size", 2))
    )
    assert layout_of(ModelSpec(architecture=factory)).n_params == 48
    spec = ModelSpec(architecture=Cnn(channels=(2, 3), classes=3))
    weights = initial_weights(spec, 0).values[None]
    sums = [
        train_task(make_task([0, 1], spec=spec, rung=rung), weights, samples, population).sum_delta
        for rung in available_rungs(spec)
    ]
    assert np.linalg.norm(sums[0] - sums[1]) / np.linalg.norm(sums[1]) < 1e-5
    with pytest.raises(ConfigError, match="rung"):
        train_task(make_task([0], spec=spec, rung="batched"), weights, samples, population)


def test_embedding_model_rungs_agree() -> None:
    rng = np.random.default_rng(1)
    samples = Samples(
        torch.from_numpy(rng.integers(0, 20, (40, 5))), torch.from_numpy(rng.integers(0, 4, 40))
    )
    spec = ModelSpec(architecture=EmbeddingBag(vocabulary=20, dim=3, classes=4))
    population = ragged_population([7, 3, 8], n=40)
    weights = initial_weights(spec, 0).values[None]
    sums = [
        train_task(
            make_task([0, 1, 2], spec=spec, rung=rung), weights, samples, population
        ).sum_delta
        for rung in available_rungs(spec)
    ]
    assert len(sums) == 3
    assert all(np.linalg.norm(s - sums[-1]) / np.linalg.norm(sums[-1]) < 1e-5 for s in sums)


def test_models_with_running_statistics_are_refused() -> None:
    factory = FromFactory(factory="torch.nn:BatchNorm1d", arguments=(("num_features", 2),))
    with pytest.raises(ConfigError, match="GroupNorm"):
        layout_of(ModelSpec(architecture=factory))
    with pytest.raises(ConfigError, match="importable"):
        layout_of(ModelSpec(architecture=FromFactory(factory="torch.nn:Nothing")))


def test_screening_drops_bad_updates_and_scales_long_ones() -> None:
    samples, population = small_samples(), ragged_population([5, 5, 5])
    weights = initial_weights(SMALL, 0).values[None]
    plain = train_task(make_task([0, 1, 2]), weights, samples, population)
    clip = float(plain.norm.min()) * 0.5
    clipped = train_task(make_task([0], clip_norm=clip), weights, samples, population)
    assert np.linalg.norm(clipped.sum_delta / clipped.sum_weight) == pytest.approx(clip, rel=1e-5)
    rejected = train_task(make_task([0, 1, 2], reject_above=clip), weights, samples, population)
    assert (rejected.status == Status.REJECTED).all()
    assert not rejected.sum_delta.any()
    samples.inputs[int(population.samples(1)[0])] = float("inf")
    poisoned = train_task(make_task([0, 1, 2]), weights, samples, population)
    assert poisoned.status[1] == Status.NONFINITE
    assert np.isfinite(poisoned.sum_delta).all()


def test_read_only_weights_train_and_stay_as_they_are() -> None:
    weights = initial_weights(SMALL, 0).values[None].copy()
    before = weights.copy()
    weights.flags.writeable = False
    partial = train_task(make_task([0, 1]), weights, small_samples(), ragged_population([5, 6]))
    assert partial.sum_delta.any()
    assert np.array_equal(weights, before)
    with pytest.raises(ConfigError, match="float32"):
        Weights(weights[0].astype(np.float64), SMALL.spec_id)
    with pytest.raises(ConfigError, match="Another model"):
        Weights(before[0], "other").check_spec(SMALL)
    with pytest.raises(ConfigError, match="weights"):
        train_task(make_task([0]), before[:, :-1].copy(), small_samples(), ragged_population([5]))


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


def test_data_checks() -> None:
    x, y = np.zeros((4, 2)), np.array([0, 1, 2, 0])

    def make(**changes: object) -> FederatedData:
        values = {"inputs": x, "targets": y, "test_inputs": x, "test_targets": y, "classes": 3}
        return FederatedData(name="d", **{**values, **changes})  # type: ignore[arg-type]

    assert make(inputs=x[:, ::-1].astype(np.float16)).inputs.dtype == np.float32
    for changes, word in (
        ({"classes": 2}, "labels from 0 to 1"),
        ({"inputs": x[:3]}, "as many as inputs"),
        ({"inputs": np.full((4, 2), np.nan)}, "finite"),
        ({"targets": y + 0.5}, "whole-number"),
        ({"keys": np.array([1])}, "keys"),
    ):
        with pytest.raises(ConfigError, match=word):
            make(**changes)
