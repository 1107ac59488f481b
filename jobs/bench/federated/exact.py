"""Those claims of the federated core that need no Ray: exactness, accuracy, population size."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.bench.federated.on_ray import LOCAL, SPEC, digits_population
from raysys import machine
from raysys.bench import Baseline, Claim, Profile
from raysys.errors import CapabilityError
from raysys.federated.core.batching import draw_batches
from raysys.federated.core.datasets import load_digits_data, load_mnist_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import evaluate
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.ladder import available_rungs, train_chunk
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import (
    Cnn,
    EmbeddingBag,
    Mlp,
    ModelSpec,
    initial_weights,
    layout_of,
)
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.population import population_from_lists
from raysys.federated.core.randomness import KeyedStreams, Purpose
from raysys.federated.core.runner import run_round
from raysys.ops.batched_mlp import train_each_client

# Accuracies of "Federated core", section "Acceptance": mean of the last 10 rounds, 2 seeds.
REFERENCE = {"iid": 0.918, "dirichlet": 0.908, "shards": 0.893}
RAGGED = [60, 52, 47, 33, 20, 9]


def equal_to_loop(profile: Profile) -> Claim:
    """Largest relative distance of any rung to a plain autograd loop after 50 steps.

    Ragged clients, momentum, weight decay and the proximal term; MLP, CNN and embedding model.
    """
    del profile
    config = LocalConfig(
        steps=50, batch_size=10, lr=0.05, momentum=0.5, weight_decay=1e-3, prox_mu=0.01
    )
    short = LocalConfig(
        epochs=5, batch_size=10, lr=0.05, momentum=0.5, weight_decay=1e-3, prox_mu=0.01
    )
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 10, 300))
    pixels = torch.from_numpy(rng.random((300, 1, 8, 8), dtype=np.float32))
    tokens = torch.from_numpy(rng.integers(0, 40, (300, 6)))
    cases = {
        "mlp": (ModelSpec(architecture=Mlp(sizes=(64, 64, 10))), pixels),
        "cnn": (ModelSpec(architecture=Cnn(channels=(8, 16))), pixels),
        "embedding": (ModelSpec(architecture=EmbeddingBag(vocabulary=40)), tokens),
    }
    gaps = {
        f"{name} {rung} {label}": _gap(spec, rung, inputs, y, local)
        for name, (spec, inputs) in cases.items()
        for rung in available_rungs(spec)
        for label, local in (("50 steps", config), ("5 epochs", short))
    }
    return Claim(
        name="equal_to_loop",
        value=max(gaps.values()),
        unit="relative distance of weights",
        better="lower",
        samples=gaps,
        seeds=[0],
    )


def _gap(spec: ModelSpec, rung: str, inputs: Tensor, targets: Tensor, local: LocalConfig) -> float:
    rng = np.random.default_rng(1)
    population = population_from_lists([rng.integers(0, len(targets), n) for n in RAGGED])
    clients = np.arange(len(RAGGED))
    batches = draw_batches(population, clients, local, KeyedStreams(0, Purpose.BATCHES))
    weights = torch.from_numpy(initial_weights(spec, 0).values[np.newaxis])
    rows = torch.zeros(len(clients), dtype=torch.int64)
    start = weights[rows]
    ours = train_chunk(rung, spec, weights, rows, inputs, targets, batches, local).delta + start
    layout = layout_of(spec)
    params = [part.clone() for part in layout.split(start)]
    module = spec.architecture.build()

    def forward(own: Any, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, dict(zip(layout.names, own)), (x,))
        return out

    train_each_client(
        forward, params, inputs, targets, batches.index, batches.scale, batches.active,
        lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay,
        prox_mu=local.prox_mu, drift=None, regression=False,
    )  # fmt: skip
    plain = torch.cat([part.reshape(len(clients), -1) for part in params], dim=1)
    distance = (ours - plain).norm(dim=1) / plain.norm(dim=1)
    return float(distance.max())


def population_free(profile: Profile) -> Claim:
    """CPU time of a round with 1,000,000 registered clients over that with 1,000."""
    data = load_digits_data(0)
    samples = data.samples()
    torch.set_num_threads(1)
    jobs = {
        n: FederatedJob(FedAvg(SPEC, LOCAL, 100), digits_population(n, len(data.targets)))
        for n in (1_000, 1_000_000)
    }
    times: dict[int, list[float]] = {n: [] for n in jobs}
    for repeat in range(profile.pick(120, 300)):
        for n, job in jobs.items() if repeat % 2 else reversed(jobs.items()):
            begin = time.process_time()
            run_round(job, samples)
            times[n].append(time.process_time() - begin)
    medians = {n: statistics.median(values[5:]) for n, values in times.items()}
    return Claim(
        name="population_free",
        value=medians[1_000_000] * 1000,
        unit="ms of CPU per round of 100 clients",
        better="lower",
        baseline=Baseline(name="1,000 registered clients", value=medians[1_000] * 1000),
        ratio=statistics.median(b / a for a, b in zip(times[1_000][5:], times[1_000_000][5:])),
        samples={str(n): values for n, values in times.items()},
        seeds=[0],
    )


def fedavg_reference(profile: Profile) -> Claim:
    """Largest distance to the reference accuracies of FedAvg on 10,000 MNIST images at 14x14.

    100 clients of 80 samples, 20 a round, batch 10, lr 0.1, MLP 196-64-10, 400 rounds; mean of the
    last ten rounds over the seeds. The reference's own tolerance is 0.01.
    """
    folder = machine.data_dir()
    if folder is None:
        raise CapabilityError(
            "MNIST test images", "there is no data folder", "Point RAYSYS_DATA at one"
        )
    seeds = profile.pick([0], [0, 1])
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {scheme: [] for scheme in REFERENCE}
    for seed in seeds:
        data = load_mnist_data(folder / "mnist-t10k", seed, side=14)
        samples, test = data.samples(), data.test_samples()
        spec = ModelSpec(architecture=Mlp(sizes=(196, 64, 10)))
        for scheme in REFERENCE:
            population = partition(data.targets, PartitionConfig(scheme=scheme), seed)
            job = FederatedJob(FedAvg(spec, LOCAL, 20), population, seed)
            last = []
            for round_id in range(400):
                run_round(job, samples)
                if round_id >= 390:
                    last.append(evaluate(spec, job.strategy.weights(0), test).accuracy)
            found[scheme].append(statistics.mean(last))
    means = {scheme: statistics.mean(values) for scheme, values in found.items()}
    gaps = {scheme: means[scheme] - REFERENCE[scheme] for scheme in REFERENCE}
    return Claim(
        name="fedavg_reference",
        value=max(abs(gap) for gap in gaps.values()),
        unit="largest distance in accuracy",
        better="lower",
        samples={"accuracy": found, "mean": means, "reference": REFERENCE, "gap": gaps},
        seeds=seeds,
    )
