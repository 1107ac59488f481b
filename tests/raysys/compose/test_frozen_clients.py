"""Frozen layers inside federated clients: neither trained nor sent, and the model stays whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.compose.frozen_clients import (
    FreezeConfig,
    FrozenPrefixJob,
    PlasticityWatch,
    linear_schedule,
    sent_by,
)
from raysys.errors import ConfigError
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.recipe import FederatedConfig, load_data, make_population

SIZES = (64, 12, 8, 10)
FIRST, SECOND = 65 * 12, 13 * 8
RECIPE = FederatedConfig(seed=3, clients_per_round=5)


def make_job() -> tuple[FrozenPrefixJob, torch.Tensor]:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    population = make_population(RECIPE, data)
    local = LocalConfig(steps=2)
    job = FrozenPrefixJob(SIZES, local, 5, population, data.samples(), RECIPE.seed)
    return job, data.samples().inputs


def test_a_frozen_prefix_is_neither_trained_nor_sent() -> None:
    job, inputs = make_job()
    spec = ModelSpec(architecture=Mlp(sizes=SIZES))
    full = job.round()
    whole = job.weights.copy()
    before = outputs(spec, whole, inputs[:20])
    job.freeze(1)
    assert np.array_equal(job.weights, whole)  # freezing alone changes no weight
    part = job.round()
    assert np.array_equal(job.weights[:FIRST], whole[:FIRST])
    assert not np.array_equal(job.weights[FIRST:], whole[FIRST:])
    assert full.bytes_up - part.bytes_up == 4 * FIRST * 5
    assert not torch.equal(outputs(spec, job.weights, inputs[:20]), before)
    job.freeze(2)
    job.round()
    assert np.array_equal(job.weights[:FIRST], whole[:FIRST])
    with pytest.raises(ConfigError, match="upto"):
        job.freeze(1)
    with pytest.raises(ConfigError, match="upto"):
        job.freeze(3)


def test_freezing_does_not_change_who_is_drawn() -> None:
    job, _ = make_job()
    plain, _ = make_job()
    job.round()
    plain.round()
    job.freeze(1)
    mine, theirs = job.round(), plain.round()
    assert np.array_equal(mine.table.clients, theirs.table.clients)


def test_the_watch_freezes_layers_that_stand_still_and_no_others() -> None:
    generator = np.random.default_rng(0)
    size = FIRST + SECOND + 9 * 10
    weights = generator.normal(0, 0.2, size).astype(np.float32)
    inputs = torch.from_numpy(generator.normal(0, 1, (16, 64)).astype(np.float32))
    still = PlasticityWatch(SIZES, inputs, FreezeConfig(every=1, lag=1, window=2))
    moving = PlasticityWatch(SIZES, inputs, FreezeConfig(every=1, lag=1, window=2))
    for round_id in range(30):
        # The second front grows ever faster: its plasticity never becomes flat.
        step = 0.02 * 1.2**round_id * generator.normal(0, 1, size).astype(np.float32)
        moving.observe(round_id, weights + step)
        slow = weights.copy()
        slow[:FIRST] += 0.2 * 0.3**round_id * step[:FIRST]
        still.observe(round_id, slow)
    assert still.frozen == 2  # the output layer is never frozen
    assert moving.frozen == 0


def test_the_linear_schedule_sends_as_much_as_it_was_told() -> None:
    told = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    schedule = linear_schedule(SIZES, 10, sent_by(SIZES, told))
    assert sorted(schedule) == schedule
    assert max(schedule) <= 2
    assert sent_by(SIZES, [0] * 10) == 10 * (FIRST + SECOND + 90)
    assert abs(sent_by(SIZES, schedule) - sent_by(SIZES, told)) <= FIRST
