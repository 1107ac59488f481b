"""Small planted populations of digits and Auxo jobs on them, for several tests."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import (
    Planted,
    PlantedConfig,
    plant,
    score_clients,
)
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.population import Population

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))
LOCAL = LocalConfig(batch_size=10, lr=0.1)
CLIENTS, PER_ROUND = 160, 40
CONFIG = AuxoConfig(k_max=4, start_round=2, sketch_dim=64)


@functools.lru_cache
def population(groups: int = 2, kind: str = "labels", alpha: float = 20.0) -> Planted:
    config = PlantedConfig(kind=kind, groups=groups, clients=CLIENTS, samples=30, alpha=alpha)
    return plant(load_digits_data(0, image=True), config, 0)


def make_inner() -> FedAvg:
    return FedAvg(SPEC, LOCAL, PER_ROUND)


def auxo_job(
    config: AuxoConfig = CONFIG, planted: Planted | None = None, make: object = make_inner
) -> tuple[FederatedJob, Auxo]:
    strategy = Auxo(config, PER_ROUND, make)  # type: ignore[arg-type]
    return FederatedJob(strategy, (planted or population()).population, 3), strategy


def split_round(strategy: Auxo) -> int:
    return next(e["round"] for e in strategy.events if e["event"] == "split")


def quality(strategy: Auxo, planted: Planted) -> float:
    leaves = np.array(strategy.tree.leaves)
    models = np.stack([strategy.weights(int(leaf) * STRIDE) for leaf in leaves])
    clients = np.arange(CLIENTS)
    row = np.searchsorted(leaves, strategy.best_leaves(clients))
    return score_clients(planted, SPEC, models, row, clients).ari


def by_group(planted: Planted) -> Planted:
    """The same clients, numbered group after group."""
    order = np.argsort(planted.group_of, kind="stable")
    ids = planted.population.sample_ids.reshape(CLIENTS, -1)[order].reshape(-1)
    people = dataclasses.replace(planted.population, sample_ids=ids)
    return dataclasses.replace(planted, population=people, group_of=planted.group_of[order])


def some_clients(planted: Planted, count: int) -> Population:
    """The first clients alone."""
    offsets = planted.population.offsets[: count + 1]
    ids = planted.population.sample_ids[: offsets[-1]]
    return dataclasses.replace(planted.population, offsets=offsets, sample_ids=ids)
