"""Local training of the federated core: chunks, batches, rungs that agree, screening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fl_parts import SMALL, make_task, ragged_population, small_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.federated.core.batching import cut_chunks, draw_batches
from raysys.federated.core.ladder import available_rungs
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import Status
from raysys.federated.core.model import (
    Cnn,
    EmbeddingBag,
    FromFactory,
    ModelSpec,
    Weights,
    initial_weights,
    layout_of,
)
from raysys.federated.core.randomness import KeyedStreams, Purpose
from raysys.federated.core.training import Samples, train_task


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
    assert batches.active == [3, 3, 2, 2, 2, 2, 1, 1]  # 4, 3 and 1 steps an epoch
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
