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

from jobs.bench.federated.against_engines import vs_flower, vs_pfl
from jobs.bench.federated.exact import equal_to_loop, fedavg_reference, population_free
from jobs.bench.federated.on_ray import (
    LOCAL,
    clients_per_second,
    digits_population,
    memory_flat,
    workers_equal,
)
from raysys.bench import Claim, Profile, paired_claim
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.engine import ExecutionConfig, FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.model import Cnn, Mlp, ModelSpec, initial_weights, layout_of, load_flat
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
POPULATION, PER_ROUND = 1000, 100


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
    spec: ModelSpec, image: bool, rounds: int, repeats: int, per_round: int = PER_ROUND
) -> tuple[list[float], list[float]]:
    """Clients per CPU second of our engine and of the plain loop, taken alternately."""
    torch.set_num_threads(1)
    data = load_digits_data(0, image=image)
    population = digits_population(POPULATION, len(data.targets))
    samples = data.samples()
    job = FederatedJob(FedAvg(spec, LOCAL, per_round), population, 0, ExecutionConfig())
    loop = PlainLoop(spec, data, population)
    weights = initial_weights(spec, 0).values
    clients = np.arange(per_round)
    run_round(job, samples)  # first calls compile and allocate
    loop.round(weights, clients[:10], 0)
    ours, baseline = [], []
    for repeat in range(repeats):
        ours.append(_rate(lambda: run_round(job, samples), rounds, per_round))
        work = functools.partial(loop.round, weights, clients, repeat)
        baseline.append(_rate(work, 1, per_round))
    return ours, baseline


def _rate(work: Callable[[], object], rounds: int, per_round: int) -> float:
    begin = time.process_time()
    for _ in range(rounds):
        work()
    return rounds * per_round / (time.process_time() - begin)


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


def large_model_vs_loop(profile: Profile) -> Claim:
    """Clients per CPU second on a CNN of 1.2 million parameters: the loop rung against the loop."""
    spec = ModelSpec(architecture=Cnn(image=(1, 8, 8), channels=(32, 64), hidden=(2048, 312)))
    repeats = profile.pick(3, 5)
    ours, baseline = compare_with_loop(spec, True, 1, repeats, per_round=profile.pick(10, 20))
    return paired_claim(
        "large_model_vs_loop",
        "clients per CPU second",
        "higher",
        ours=ours,
        baseline_name="plain per-client loop (one module, torch.optim.SGD)",
        baseline=baseline,
        seeds=[0],
        extra={"parameters": layout_of(spec).n_params},
    )


CLAIMS = {
    "clients_per_second_vs_loop": clients_per_second_vs_loop,
    "clients_per_second": clients_per_second,
    "large_model_vs_loop": large_model_vs_loop,
    "equal_to_loop": equal_to_loop,
    "workers_equal": workers_equal,
    "population_free": population_free,
    "memory_flat": memory_flat,
    "vs_flower": vs_flower,
    "vs_pfl": vs_pfl,
    "fedavg_reference": fedavg_reference,
}
