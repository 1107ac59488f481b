"""One population with unequal devices, and runs of FedTrans and its rivals on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from raysys import machine
from raysys.federated.core.datasets import (
    FederatedData,
    load_digits_data,
    load_fashion_data,
    load_mnist_data,
)
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec, Weights
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round
from raysys.federated.core.strategy import RoundReport, Strategy
from raysys.federated.fedtrans.cells import Cell, Dense
from raysys.federated.fedtrans.config import FedTransConfig, GrowthConfig
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.recipe import simulated_speeds
from raysys.federated.fedtrans.rivals.capped import CappedFedAvg
from raysys.federated.fedtrans.rivals.splitmix import SplitMix
from raysys.federated.fedtrans.rivals.submodels import Submodels, mlp_macs
from raysys.federated.fedtrans.strategy import FedTrans

LOCAL = LocalConfig(steps=20, batch_size=10, lr=0.05)
CLIENTS, PER_ROUND, SPREAD = 100, 20, 32.0
FIRST_WIDTH = 4
PARTITIONS = {
    "dirichlet": PartitionConfig(scheme="dirichlet", clients=CLIENTS, alpha=0.5),
    "two classes": PartitionConfig(scheme="shards", clients=CLIENTS, classes_per_client=2),
}
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arena:
    """Data, clients with their label mixes, and the first model.

    Args:
        mix: share of each class at each client, float64 [clients, classes].
    """

    data: FederatedData
    population: Population
    net: CellNet
    mix: FloatArray
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A finished run.

    Args:
        accuracy: mean over clients of the accuracy of the model deployed on each, weighted by the
            client's own label mix. quartiles: over clients, 25th and 75th percentile.
        macs: multiply-accumulates of all local training. rounds: how many there were.
        curve: (macs, accuracy) along the way.
    """

    accuracy: float
    quartiles: tuple[float, float]
    macs: float
    rounds: int
    bytes_moved: int
    curve: tuple[tuple[float, float], ...]


def data_sets() -> tuple[str, ...]:
    """MNIST and Fashion-MNIST where this machine has them, else the packaged digits."""
    folder = machine.data_dir()
    known = {"mnist": "mnist-t10k", "fashion": "fashion-mnist"}
    here = tuple(name for name, sub in known.items() if folder and (folder / sub).is_dir())
    return here or ("digits",)


@functools.lru_cache(maxsize=4)
def load(name: str, seed: int) -> FederatedData:
    """About 8,000 training images at 14x14; digits as they are."""
    folder = machine.data_dir() or Path()
    if name == "digits":
        return load_digits_data(seed, image=True)
    if name == "mnist":
        return load_mnist_data(folder / "mnist-t10k", seed, side=14)
    full = load_fashion_data(folder / "fashion-mnist", seed, side=14, train=8000)
    return dataclasses.replace(
        full, test_inputs=full.test_inputs[:4000], test_targets=full.test_targets[:4000]
    )


def make_arena(
    name: str, scheme: str, seed: int, cells: tuple[Cell, ...] = (Dense(width=FIRST_WIDTH),)
) -> Arena:
    """Clients whose devices span 32 times in speed, log-uniformly; the slowest runs ``cells``."""
    data = load(name, seed)
    population = partition(data.targets, PARTITIONS[scheme], seed)
    net = CellNet(
        shape=tuple(data.inputs.shape[1:]),
        cells=cells,
        classes=data.classes or 0,
    )
    rates = simulated_speeds(CLIENTS, net.macs(), SPREAD, seed)
    population = dataclasses.replace(population, rate_mac_s=rates)
    mix = np.stack(
        [
            np.bincount(data.targets[population.samples(c)], minlength=net.classes)
            for c in range(CLIENTS)
        ]
    ).astype(np.float64)
    mix /= np.maximum(mix.sum(axis=1, keepdims=True), 1)
    return Arena(data=data, population=population, net=net, mix=mix, seed=seed)


def fedtrans(arena: Arena, config: FedTransConfig) -> FedTrans:
    """FedTrans on an arena, with plain federated averaging inside."""

    def line(spec: ModelSpec, start: Weights | None) -> FedAvg:
        return FedAvg(spec, LOCAL, PER_ROUND, start_weights=start)

    return FedTrans(arena.net, PER_ROUND, line, config)


def growing(rounds: int, **changes: object) -> GrowthConfig:
    """Growth settings for a run of so many rounds: the last third only trains."""
    return dataclasses.replace(GrowthConfig(end_round=rounds * 2 // 3), **changes)  # type: ignore[arg-type]


def full_sizes(strategy: FedTrans) -> tuple[int, ...]:
    """Layer sizes of the largest model of a family, which rivals get as their full model."""
    largest = max(strategy.family(), key=lambda model: model.net.macs())
    return tuple(largest.net.spec().architecture.sizes)


def rivals(arena: Arena, sizes: tuple[int, ...]) -> dict[str, Callable[[], Strategy]]:
    """The methods to compare with, each to be built anew for a run."""
    full = ModelSpec(architecture=Mlp(sizes=sizes))
    middle_rate = float(np.median(arena.population.rate_mac_s))  # type: ignore[arg-type]
    middle = _fitting(sizes, middle_rate)
    most = max(2, round(mlp_macs(sizes) / arena.net.macs()))
    return {
        "heterofl": lambda: Submodels(sizes, LOCAL, PER_ROUND, "heterofl"),
        "fedrolex": lambda: Submodels(sizes, LOCAL, PER_ROUND, "fedrolex"),
        "fluid": lambda: Submodels(sizes, LOCAL, PER_ROUND, "fluid"),
        "splitmix": lambda: SplitMix(sizes, LOCAL, PER_ROUND, min(16, most)),
        "fedavg small": lambda: CappedFedAvg(arena.net.spec(), LOCAL, PER_ROUND, 0.0),
        "fedavg middle": lambda: CappedFedAvg(
            ModelSpec(architecture=Mlp(sizes=middle)), LOCAL, PER_ROUND, mlp_macs(middle)
        ),
        "fedavg unlimited": lambda: CappedFedAvg(full, LOCAL, PER_ROUND, 0.0),
    }


def play(
    arena: Arena,
    strategy: Strategy,
    rounds: int,
    budget: float | None = None,
    points: int = 12,
    work: Callable[[RoundReport], float] | None = None,
) -> Outcome:
    """Train for so many rounds, or until the budget of multiply-accumulates is spent.

    Args:
        points: evaluations along the way, evenly over the rounds (or the budget).
        work: multiply-accumulates of a round; None takes the report's, which are exact for
            perceptrons.
    """
    job = FederatedJob(strategy, arena.population, arena.seed)
    samples = arena.data.samples()
    macs, moved = 0.0, 0
    curve: list[tuple[float, float]] = []
    while job.round_id < rounds and (budget is None or macs < budget):
        report = run_round(job, samples)
        macs += report.macs if work is None else work(report)
        moved += report.bytes_down + report.bytes_up
        done = job.round_id / rounds if budget is None else macs / budget
        if done * points >= len(curve) + 1:
            curve.append((macs, float(client_accuracy(arena, strategy).mean())))
    final = client_accuracy(arena, strategy)
    low, high = np.percentile(final, [25, 75])
    return Outcome(
        accuracy=float(final.mean()),
        quartiles=(float(low), float(high)),
        macs=macs,
        rounds=job.round_id,
        bytes_moved=moved,
        curve=tuple(curve),
    )


def client_accuracy(arena: Arena, strategy: Strategy) -> FloatArray:
    """Accuracy of each client's deployed model on the test set, by the client's label mix.

    A client whose device cannot run the one model of a capped FedAvg answers by chance.
    """
    inputs, targets = torch.from_numpy(arena.data.test_inputs), arena.data.test_targets
    probabilities: dict[int, npt.NDArray[np.float32]] = {}
    by_class: dict[tuple[tuple[int, float], ...], FloatArray] = {}
    chance = np.full(arena.net.classes, 1.0 / arena.net.classes)
    least = strategy.needed_mac_s if isinstance(strategy, CappedFedAvg) else 0.0
    rates = arena.population.rate_mac_s
    found = np.zeros(CLIENTS)
    for client in range(CLIENTS):
        plan = tuple(strategy.predict_plan(client))
        if rates is not None and rates[client] < least:
            found[client] = arena.mix[client] @ chance
            continue
        if plan not in by_class:
            for model, _ in plan:
                if model not in probabilities:
                    out = outputs(strategy.model_spec(model), strategy.weights(model), inputs)
                    probabilities[model] = out.softmax(dim=1).numpy()
            mean = sum(share * probabilities[model] for model, share in plan)
            right = np.argmax(mean, axis=1) == targets
            total = np.bincount(targets, minlength=arena.net.classes)
            hits = np.bincount(targets[right], minlength=arena.net.classes)
            by_class[plan] = hits / np.maximum(total, 1)
        found[client] = arena.mix[client] @ by_class[plan]
    return found


def _fitting(sizes: tuple[int, ...], macs: float) -> tuple[int, ...]:
    """The full model with its hidden widths scaled until it costs at most ``macs``."""
    for ratio in np.linspace(1, 0, 64, endpoint=False):
        scaled = (sizes[0], *(max(1, int(w * ratio)) for w in sizes[1:-1]), sizes[-1])
        if mlp_macs(scaled) <= macs:
            return scaled
    return (sizes[0], *(1 for _ in sizes[1:-1]), sizes[-1])
