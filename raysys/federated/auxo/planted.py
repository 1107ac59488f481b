"""Populations with known groups, to measure cohorts against: permuted labels, turns, inversion.

Every group sees its own transformation of a common pool of samples. A client belongs to one group
and draws its samples by its own label mix, so that individual skew and group structure compete.
Clients may share samples: the pools at hand are smaller than the populations of interest.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from raysys.config import check, check_choice, check_range
from raysys.federated.auxo.clustering import adjusted_rand
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import Purpose, generator

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
KINDS = ("labels", "rotation", "inversion")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlantedConfig:
    """Which groups to plant.

    Args:
        kind: "labels" (each group permutes the labels), "rotation" (turns by 90 degrees, at most
            four groups), or "inversion" (dark for light, at most two).
        groups: number of groups; 1 plants none. shares: size of each group, or None for equal.
        clients: number of clients. samples: samples of each. alpha: Dirichlet label mix.
    """

    kind: str = "labels"
    groups: int = 4
    shares: tuple[float, ...] | None = None
    clients: int = 1000
    samples: int = 40
    alpha: float = 5.0

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)
        most = {"labels": 64, "rotation": 4, "inversion": 2}[self.kind]
        check_range(self, "groups", 1, most)
        check_range(self, "clients", 1)
        check_range(self, "samples", 1)
        check_range(self, "alpha", 0, low_open=True)
        if self.shares is not None:
            good = len(self.shares) == self.groups and min(self.shares) > 0
            check(self, "shares", good, f"{self.groups} positive shares")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A planted population.

    Args:
        data: samples of all groups, group after group. population: the clients.
        group_of: true group of each client, int64 [n]. mix: label mix of each client [n, classes].
        test_inputs, test_targets: the test set as each group sees it, [groups, N, ...].
    """

    data: FederatedData
    population: Population
    group_of: IntArray
    mix: FloatArray
    test_inputs: npt.NDArray[np.float32]
    test_targets: IntArray


def plant(base: FederatedData, config: PlantedConfig, seed: int) -> Planted:
    """Deal ``base`` to clients in groups; the same arguments give the same population."""
    rng = generator(seed, Purpose.PARTITION)
    views = [
        _view(base.inputs, base.targets, config, g, base.classes, seed)
        for g in range(config.groups)
    ]
    tests = [
        _view(base.test_inputs, base.test_targets, config, g, base.classes, seed)
        for g in range(config.groups)
    ]
    shares = np.array(config.shares or (1.0,) * config.groups, dtype=np.float64)
    ends = np.round(np.cumsum(shares / shares.sum()) * config.clients).astype(np.int64)
    group_of = rng.permutation(np.searchsorted(ends, np.arange(config.clients), side="right"))
    mix = rng.dirichlet(np.full(base.classes, config.alpha), size=config.clients)
    pools = [[np.flatnonzero(targets == c) for c in range(base.classes)] for _, targets in views]
    rows = [
        _draw(pools[group], mix[client], config.samples, rng) + group * len(base.targets)
        for client, group in enumerate(group_of)
    ]
    data = dataclasses.replace(
        base,
        inputs=np.concatenate([inputs for inputs, _ in views]),
        targets=np.concatenate([targets for _, targets in views]),
        keys=None,
    )
    population = Population(
        offsets=np.arange(config.clients + 1, dtype=np.int64) * config.samples,
        sample_ids=np.concatenate(rows).astype(np.int32),
    )
    return Planted(
        data=data,
        population=population,
        group_of=group_of.astype(np.int64),
        mix=mix,
        test_inputs=np.stack([inputs for inputs, _ in tests]),
        test_targets=np.stack([targets for _, targets in tests]),
    )


def drift(planted: Planted, share: float, seed: int) -> tuple[Population, IntArray, IntArray]:
    """Move a share of the clients to the next group: their population, groups, and who moved.

    A client that moves keeps its images and sees them as its new group does.
    """
    rng = generator(seed, Purpose.FAULTS)
    n = planted.population.n_clients
    groups = len(planted.test_targets)
    moved = np.sort(rng.choice(n, round(share * n), replace=False))
    group_of = planted.group_of.copy()
    group_of[moved] = (group_of[moved] + 1) % groups
    pool = len(planted.data.targets) // groups
    ids = planted.population.sample_ids.reshape(n, -1) % pool + group_of[:, None] * pool
    population = Population(
        offsets=planted.population.offsets, sample_ids=ids.reshape(-1).astype(np.int32)
    )
    return population, group_of, moved


def _view(
    inputs: npt.NDArray[np.float32],
    targets: IntArray,
    config: PlantedConfig,
    group: int,
    classes: int,
    seed: int,
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """A pool of samples as one group sees it."""
    if config.kind == "labels":
        # Group 0 keeps its labels; the others are drawn, so that no two are related.
        order = generator(seed, Purpose.PARTITION, 1, group).permutation(classes)
        return inputs, targets if group == 0 else order[targets]
    if config.kind == "rotation":
        return np.ascontiguousarray(np.rot90(inputs, group, axes=(2, 3))), targets
    return (inputs if group == 0 else 1.0 - inputs).astype(np.float32), targets


def _draw(
    pools: list[IntArray], mix: FloatArray, samples: int, rng: np.random.Generator
) -> IntArray:
    """Rows of one client: different ones within a class as long as the class has enough."""
    counts = rng.multinomial(samples, mix)
    parts = [
        rng.choice(pool, count, replace=count > len(pool)) for pool, count in zip(pools, counts)
    ]
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CohortScore:
    """Accuracy over clients, each with its assigned model, as shares in [0, 1].

    ``worst`` and ``best`` are the means of the lowest and highest tenth; ``ari`` compares the
    assignment with the planted groups.
    """

    mean: float
    worst: float
    best: float
    variance: float
    ari: float


def score_clients(
    planted: Planted,
    spec: ModelSpec,
    weights_MP: npt.NDArray[np.float32],
    model_of: IntArray,
    clients: IntArray,
    group_of: IntArray | None = None,
) -> CohortScore:
    """Score clients on the test set as their group sees it, weighted by their own label mix.

    Args:
        weights_MP: the models. model_of: row of ``weights_MP`` of each of ``clients``.
        group_of: group of every client now, where it is no longer the planted one.
    """
    groups = planted.group_of if group_of is None else group_of
    by_class = class_accuracy(planted, spec, weights_MP)
    own = groups[clients]
    accuracy = (by_class[model_of, own] * planted.mix[clients]).sum(axis=1)
    ordered = np.sort(accuracy)
    tenth = max(1, len(ordered) // 10)
    return CohortScore(
        mean=float(accuracy.mean()),
        worst=float(ordered[:tenth].mean()),
        best=float(ordered[-tenth:].mean()),
        variance=float(accuracy.var()),
        ari=adjusted_rand(model_of, own),
    )


def class_accuracy(
    planted: Planted, spec: ModelSpec, weights_MP: npt.NDArray[np.float32]
) -> FloatArray:
    """Accuracy of each model on each class of each group's test set, [models, groups, classes]."""
    found = np.zeros((len(weights_MP), len(planted.test_targets), planted.data.classes))
    for group, (inputs, targets) in enumerate(zip(planted.test_inputs, planted.test_targets)):
        samples = torch.from_numpy(np.ascontiguousarray(inputs))
        count = np.maximum(np.bincount(targets, minlength=planted.data.classes), 1)
        for row, weights in enumerate(weights_MP):
            hit = outputs(spec, weights, samples).argmax(dim=1).numpy() == targets
            found[row, group] = (
                np.bincount(targets, weights=hit, minlength=planted.data.classes) / count
            )
    return found
