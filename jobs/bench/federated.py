"""Claims of the federated core: speed against a plain loop, exactness, determinism, flat memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysys.bench import Claim, Profile, paired_claim
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.engine import ExecutionConfig, FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Cnn, Mlp, ModelSpec, initial_weights, load_flat
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round

CONFIG: dict[str, Any] = {
    "dataset": "digits 8x8, 50 samples per client drawn with repetition",
    "population": 1000,
    "clients_per_round": 100,
    "local": {"epochs": 1, "batch_size": 10, "lr": 0.1},
    "mlp": [64, 64, 10],
    "cnn": {"channels": [8, 16], "image": [1, 8, 8]},
}
LOCAL = LocalConfig(epochs=1, batch_size=10, lr=0.1)
POPULATION, PER_ROUND, SAMPLES = 1000, 100, 50


def digits_population(n_clients: int, n_samples: int, seed: int = 0) -> Population:
    """Clients of 50 samples each, drawn with repetition from the training set."""
    rng = np.random.default_rng(seed)
    return Population(
        offsets=np.arange(n_clients + 1, dtype=np.int64) * SAMPLES,
        sample_ids=rng.integers(0, n_samples, n_clients * SAMPLES, dtype=np.int32),
    )


class PlainLoop:
    """The baseline: one re-used module, data in memory, autograd and torch.optim.SGD per client."""

    def __init__(self, spec: ModelSpec, data: FederatedData, population: Population) -> None:
        self._spec = spec
        self._samples = data.samples()
        self._population = population
        self._module: nn.Module = spec.architecture.build()

    def round(self, weights: np.ndarray, clients: np.ndarray, seed: int) -> np.ndarray:
        """Train the clients one after another; returns the mean of their weights."""
        rng = np.random.default_rng(seed)
        total = torch.zeros(len(weights), dtype=torch.float64)
        for client in clients:
            load_flat(self._module, weights)
            optimiser = torch.optim.SGD(self._module.parameters(), lr=LOCAL.lr)
            rows = torch.from_numpy(
                rng.permutation(self._population.samples(int(client))).astype(np.int64)
            )
            for batch in torch.split(rows, LOCAL.batch_size):
                optimiser.zero_grad()
                loss = self._loss(self._samples.inputs[batch], self._samples.targets[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            total += nn.utils.parameters_to_vector(self._module.parameters()).detach()
        return (total / len(clients)).to(torch.float32).numpy()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._module(x), y)


def compare_with_loop(
    spec: ModelSpec, image: bool, rounds: int, repeats: int, loop_rounds: int = 1
) -> tuple[list[float], list[float]]:
    """Clients per CPU second of our engine and of the plain loop, taken alternately."""
    torch.set_num_threads(1)
    data = load_digits_data(0, image=image)
    population = digits_population(POPULATION, len(data.targets))
    samples = data.samples()
    job = FederatedJob(FedAvg(spec, LOCAL, PER_ROUND), population, 0, ExecutionConfig())
    loop = PlainLoop(spec, data, population)
    weights = initial_weights(spec, 0).values
    clients = np.arange(PER_ROUND)
    run_round(job, samples)  # first calls compile and allocate
    loop.round(weights, clients[:10], 0)
    ours, baseline = [], []
    for repeat in range(repeats):
        ours.append(_rate(lambda: run_round(job, samples), rounds))
        baseline.append(_rate(functools.partial(loop.round, weights, clients, repeat), loop_rounds))
    return ours, baseline


def _rate(work: Callable[[], object], rounds: int) -> float:
    begin = time.process_time()
    for _ in range(rounds):
        work()
    return rounds * PER_ROUND / (time.process_time() - begin)


def clients_per_second_vs_loop(profile: Profile) -> Claim:
    """Clients per CPU second, vectorised against the plain loop: MLP, small CNN beside it."""
    repeats = profile.pick(5, 9)
    mlp = ModelSpec(architecture=Mlp(sizes=(64, 64, 10)))
    cnn = ModelSpec(architecture=Cnn(image=(1, 8, 8), channels=(8, 16)))
    ours, baseline = compare_with_loop(mlp, False, profile.pick(10, 20), repeats)
    cnn_ours, cnn_baseline = compare_with_loop(cnn, True, 1, repeats)
    return paired_claim(
        "clients_per_second_vs_loop",
        "clients per CPU second",
        "higher",
        ours=ours,
        baseline_name="plain per-client loop (one module, torch.optim.SGD)",
        baseline=baseline,
        seeds=[0],
        extra={
            "cnn": {
                "ours": cnn_ours,
                "baseline": cnn_baseline,
                "ratio": [a / b for a, b in zip(cnn_ours, cnn_baseline)],
                "median_ours": statistics.median(cnn_ours),
                "median_ratio": statistics.median(a / b for a, b in zip(cnn_ours, cnn_baseline)),
            }
        },
    )


CLAIMS = {"clients_per_second_vs_loop": clients_per_second_vs_loop}
