"""Streams, splits, populations and data sets of the federated core."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fl_parts import ragged_population
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.datasets import FederatedData
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
    config = PartitionConfig(scheme="planted", clients=6, groups=((0, 1), (2,)))
    assert np.array_equal(partition(labels, config, 0).sample_ids, planted.sample_ids)


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
    with pytest.raises(ConfigError, match="groups"):
        PartitionConfig(scheme="planted")
    with pytest.raises(ConfigError, match="groups"):
        PartitionConfig(scheme="iid", groups=((0,),))
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
