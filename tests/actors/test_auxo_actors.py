"""Auxo through Ray: a coordinator that dies around a split, and an ensemble in every cohort."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import ray

from actors.federated.cohorts import build_auxo, explain
from actors.federated.driver import FederatedRun
from actors.session import Session
from raysys.errors import ConfigError
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import Planted, PlantedConfig, plant
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.recipe import FederatedConfig, ServerConfig
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig
from raysys.runs import RunDirectory

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))
RECIPE = FederatedConfig(seed=3, clients_per_round=40, local=LocalConfig(batch_size=10, lr=0.1))
AUXO = AuxoConfig(k_max=3, start_round=2, sketch_dim=64)
ROUNDS = 26


@functools.lru_cache
def planted() -> Planted:
    config = PlantedConfig(groups=2, clients=160, samples=30, alpha=20.0)
    return plant(load_digits_data(0, image=True), config, 0)


def start(run_uri: str | None) -> FederatedRun:
    make = functools.partial(build_auxo, RECIPE, AUXO, None, SPEC)
    return FederatedRun(
        RECIPE, planted().data, planted().population, SPEC, workers=1, worker_cpus=0,
        run_uri=run_uri, checkpoint_every=1, slice_s=0.05, make=make,
    )  # fmt: skip


@pytest.fixture
def run_uri(tmp_path: object) -> str:
    uri = f"{tmp_path}/run"
    RunDirectory.create(uri, job="federate", config={}, seeds=[3], now="2026-01-01T00:00:00+00:00")
    return uri


def test_killed_between_a_split_and_its_first_round_gives_the_same_tree(
    ray_session: Session, run_uri: str
) -> None:
    whole = start(None)
    try:
        for _ in whole.rounds(ROUNDS):
            pass
        expected, facts = ray.get(whole.actor.state.remote()), whole.explain()
    finally:
        whole.close()
    split = next(e["round"] for e in facts["events"] if e["event"] == "split")
    broken = start(run_uri)
    try:
        for summary in broken.rounds(ROUNDS):
            if summary.round_id == split:  # the split is in the checkpoint, its round is not
                ray.kill(broken.actor)
        found = ray.get(broken.actor.state.remote())
        assert broken.restarts == 1
    finally:
        broken.close()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name], equal_nan=True), name


def test_lines_that_cannot_live_in_cohorts_are_refused() -> None:
    population = planted().population
    scaffold = FederatedConfig(clients_per_round=40, server=ServerConfig(name="scaffold"))
    with pytest.raises(ConfigError, match="plain model line"):
        build_auxo(scaffold, AUXO, None, SPEC, population)
    with pytest.raises(ConfigError, match="at most 2"):
        build_auxo(RECIPE, AUXO, EnsembleConfig(k=3), SPEC, population)
    job = build_auxo(RECIPE, AUXO, EnsembleConfig(k=2), SPEC, population)
    assert explain(job.strategy)["models"] == {"0": 0}
    assert explain(object()) == {}
