"""FedTrans through Ray: a coordinator killed inside a transformation, and families in cohorts."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.federated.cohorts import build_family, explain
from actors.federated.driver import FederatedRun
from actors.federated.outcome import model_ids, sections, told, where
from actors.session import Session
from raysys.errors import ConfigError
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import Planted, PlantedConfig, plant
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.population import Population
from raysys.federated.core.privacy import PrivacyConfig
from raysys.federated.core.recipe import FederatedConfig, ServerConfig
from raysys.federated.core.runner import run_rounds
from raysys.federated.fedtrans.cells import Dense
from raysys.federated.fedtrans.config import GrowthConfig
from raysys.federated.fedtrans.lineage import Model
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.recipe import FamilyConfig, with_speeds
from raysys.federated.fedtrans.strategy import FedTrans
from raysys.runs import RunDirectory

NET = CellNet(shape=(1, 8, 8), cells=(Dense(width=8),))
RECIPE = FederatedConfig(
    seed=3, clients_per_round=40, local=LocalConfig(batch_size=10, lr=0.1),
    server=ServerConfig(name="fedyogi", eta=0.03),
)  # fmt: skip
FAMILY = FamilyConfig(growth=GrowthConfig(delta=3, gamma=2, smooth=1, beta=10.0, max_models=3))
AUXO = AuxoConfig(k_max=3, start_round=2, sketch_dim=64)
ROUNDS = 13


@functools.lru_cache
def planted() -> Planted:
    config = PlantedConfig(groups=2, clients=160, samples=30, alpha=20.0)
    return plant(load_digits_data(0, image=True), config, 0)


def speedy() -> Population:
    return with_speeds(planted().population, NET, FAMILY, 0)


def test_killed_inside_a_transformation_gives_the_same_family_to_the_bit(
    ray_session: Session, tmp_path: Path
) -> None:
    uri, mark = str(tmp_path / "run"), tmp_path / "killed"
    RunDirectory.create(uri, job="federate", config={}, seeds=[3], now="2026-01-01T00:00:00+00:00")

    def make(population: Population) -> FederatedJob:
        class Mortal(FedTrans):
            """Dies by SIGKILL once, when the second child is made and its weights are not."""

            def _add(self, child: Model, parent: int) -> None:
                self._family.append(child)
                if parent == 1 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                self._family.pop()
                super()._add(child, parent)

        job = build_family(RECIPE, FAMILY, None, NET, population)
        job.strategy.__class__ = Mortal  # type: ignore[assignment]
        return job

    whole = build_family(RECIPE, FAMILY, None, NET, speedy())
    run_rounds(whole, planted().data.samples(), ROUNDS)
    expected = whole.state()
    broken = FederatedRun(
        RECIPE, planted().data, speedy(), NET.spec(), workers=1, worker_cpus=0,
        run_uri=uri, checkpoint_every=1, slice_s=0.05, make=make,
    )  # fmt: skip
    try:
        seen = [summary.round_id for summary in broken.rounds(ROUNDS)]
        found, facts = ray.get(broken.actor.state.remote()), broken.explain()
        assert broken.restarts == 1
    finally:
        broken.close()
    assert mark.exists()
    assert seen == list(range(ROUNDS))
    assert [member["parent"] for member in facts["family"]] == [None, 0, 1]
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name], equal_nan=True), name


def test_cohorts_hold_a_family_each_and_resume_to_the_bit() -> None:
    samples = planted().data.samples()

    def fresh() -> FederatedJob:
        return build_family(RECIPE, FAMILY, AUXO, NET, speedy())

    whole = fresh()
    run_rounds(whole, samples, 22)
    parts = fresh()
    run_rounds(parts, samples, 9)
    again = fresh()
    again.load(parts.state())
    run_rounds(again, samples, 22)
    ours, theirs = whole.state(), again.state()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name], equal_nan=True), name
    strategy = whole.strategy
    assert isinstance(strategy, Auxo)
    assert len(strategy.tree.leaves) == 2
    facts = explain(strategy)
    families = facts["families"]
    assert list(families) == ["0.0", "0.1"]
    # Every client is counted in its cohort's family, and served by a model that it can run.
    assert sum(len(family["clients"]) for family in families.values()) == 160
    rates = speedy().rate_mac_s
    assert rates is not None
    for family in families.values():
        assert len(family["family"]) == 3
        macs = [member["macs"] for member in family["family"]]
        for client, model in family["clients"].items():
            assert macs[model] <= rates[int(client)]
    ids = model_ids(facts, 1)
    assert len(ids) == 6
    for name, model in ids.items():
        member = families[name.rpartition(".cohort")[2]]["family"][int(name[len("weights.model")])]
        assert len(strategy.weights(model)) == member["params"]
    assert any("family of cohort 0.1" in line for line in told(facts))
    homes = {client: name for name, family in families.items() for client in family["clients"]}
    assert where(facts, "5").endswith(f"of cohort {homes['5']}")
    assert [section.title for section in sections(facts)][1:] == [
        "Family of cohort 0.0", "Family of cohort 0.1",
    ]  # fmt: skip


def test_lines_that_a_family_cannot_lend_between_are_refused() -> None:
    for wrong, field in (
        (FederatedConfig(server=ServerConfig(name="qfedavg")), "server"),
        (FederatedConfig(privacy=PrivacyConfig(noise_multiplier=1.0)), "privacy"),
    ):
        with pytest.raises(ConfigError, match=field):
            build_family(wrong, FAMILY, None, NET, speedy())
