"""Paired runs of FedAvg and Fed-ensemble at equal communication, shared by the claims."""

from __future__ import annotations

import dataclasses
import functools
import statistics
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
from raysys.federated.core.model import Cnn, Mlp, ModelSpec
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round
from raysys.federated.fed_ensemble.baselines import Snapshots, WeightAverage
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.prediction import predict

LOCAL = LocalConfig(epochs=1, batch_size=10, lr=0.1)
CLIENTS, PER_ROUND, LAST = 100, 20, 10
SCHEMES = ("iid", "dirichlet", "shards")
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairedRun:
    """One data set, split and seed: accuracies over the last rounds, and what the models are.

    Args:
        accuracy: mean over the last ten rounds by method.
        fedavg: final weights [P]. members: final weights [K, P].
    """

    data: FederatedData
    population: Population
    spec: ModelSpec
    accuracy: dict[str, float]
    fedavg: npt.NDArray[np.float32]
    members: npt.NDArray[np.float32]
    bytes_per_update: tuple[int, int]
    coverage: npt.NDArray[np.int64]


def data_sets() -> tuple[str, ...]:
    """The data sets that this machine has; digits always."""
    folder = machine.data_dir()
    known = {"mnist": "mnist-t10k", "fashion": "fashion-mnist", "fashion-cnn": "fashion-mnist"}
    here = [name for name, sub in known.items() if folder and (folder / sub).is_dir()]
    return ("digits", *here)


@functools.lru_cache(maxsize=8)
def load(name: str, seed: int) -> FederatedData:
    """10,000 samples at most, at 14x14; digits as they are."""
    folder = machine.data_dir() or Path()
    if name == "digits":
        return load_digits_data(seed, image=True)
    if name == "mnist":
        return load_mnist_data(folder / "mnist-t10k", seed, side=14)
    full = load_fashion_data(folder / "fashion-mnist", seed, side=14, train=8000)
    return dataclasses.replace(
        full, test_inputs=full.test_inputs[:2000], test_targets=full.test_targets[:2000]
    )


def model_for(name: str, data: FederatedData) -> ModelSpec:
    """The MLP of the pilot, or a small convolutional net."""
    image = data.inputs.shape[1:]
    if name.endswith("-cnn"):
        return ModelSpec(architecture=Cnn(image=(1, int(image[1]), int(image[2]))))
    return ModelSpec(architecture=Mlp(sizes=(int(np.prod(image)), 64, 10)))


@functools.lru_cache(maxsize=128)
def paired_run(name: str, scheme: str, seed: int, rounds: int, k: int = 3) -> PairedRun:
    """Train both on the same split with the same clients per round, and score both."""
    torch.set_num_threads(1)
    data = load(name, seed)
    spec = model_for(name, data)
    population = partition(data.targets, PartitionConfig(scheme=scheme, clients=CLIENTS), seed)
    samples = data.samples()
    single = FederatedJob(FedAvg(spec, LOCAL, PER_ROUND), population, seed)
    ensemble = FedEnsemble(EnsembleConfig(k=k), PER_ROUND, lambda: FedAvg(spec, LOCAL, PER_ROUND))
    several = FederatedJob(ensemble, population, seed)
    average, snapshots = WeightAverage(0.9), Snapshots(k)
    scores: dict[str, list[float]] = {n: [] for n in ("fedavg", "ema", "snapshots", "ensemble")}
    report = other = None
    for round_id in range(rounds):
        report, other = run_round(single, samples), run_round(several, samples)
        average.add(single.strategy.weights(0))
        snapshots.add(single.strategy.weights(0))
        if round_id >= rounds - LAST:
            scores["fedavg"].append(accuracy(spec, single.strategy.weights(0)[None], data))
            scores["ema"].append(accuracy(spec, average.weights()[None], data))
            scores["snapshots"].append(accuracy(spec, snapshots.stacked(), data))
            scores["ensemble"].append(accuracy(spec, ensemble.stacked(), data))
    assert report is not None
    assert other is not None
    return PairedRun(
        data=data,
        population=population,
        spec=spec,
        accuracy={method: statistics.mean(values) for method, values in scores.items()},
        fedavg=single.strategy.weights(0),
        members=ensemble.stacked(),
        bytes_per_update=(
            report.bytes_up // report.counts["ok"],
            other.bytes_up // other.counts["ok"],
        ),
        coverage=ensemble.coverage(),
    )


def logits(
    spec: ModelSpec, members: npt.NDArray[np.float32], inputs: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Outputs of every member, float32 [K, N, C]."""
    x = torch.from_numpy(np.ascontiguousarray(inputs))
    return np.stack([outputs(spec, row, x).numpy() for row in members])


def accuracy(spec: ModelSpec, members: npt.NDArray[np.float32], data: FederatedData) -> float:
    """Accuracy of the mean of the members' probabilities on the central test set."""
    labels = predict(logits(spec, members, data.test_inputs)).labels
    return float((labels == data.test_targets).mean())
