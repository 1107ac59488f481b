"""Clients as they come: speakers of plays and raters of films. Reported as it comes out."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from jobs.bench.auxo.runs import Row
from jobs.bench.pieces import Piece, measure_pieces
from raysys import machine
from raysys.bench import Baseline, Claim, Profile
from raysys.errors import CapabilityError
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.ladder import sample_losses
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import IntArray
from raysys.federated.core.model import EmbeddingBag, ModelSpec
from raysys.federated.core.natural_data import load_movielens_data, load_shakespeare_data
from raysys.federated.core.partition import natural as natural_population
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round

HELD_OUT = 5  # one sample in five of every client


def natural(profile: Profile) -> Claim:
    """Mean loss over clients with Auxo over that with one model, on held-out samples of each.

    Raises:
        CapabilityError: neither data set is on this machine.
    """
    folder = machine.data_dir()
    found = [n for n, p in _places(folder).items() if p.exists()] if folder else []
    if not found:
        raise CapabilityError("speakers and raters", "not in the data folder", "Set RAYSYS_DATA")
    rounds, seeds = profile.pick(60, 200), range(profile.pick(1, 3))
    pieces = [
        Piece(
            f"natural-{name}-{method}-{seed}",
            {"data": name, "method": method, "seed": seed, "rounds": rounds},
            functools.partial(_run, name, method, seed, rounds),
        )
        for name in found
        for method in ("auxo", "fedavg")
        for seed in seeds
    ]
    rows = iter(measure_pieces(profile.partial, pieces))
    table = {n: {m: [next(rows) for _ in seeds] for m in ("auxo", "fedavg")} for n in found}
    ratios = [
        ours["loss"] / one["loss"]
        for row in table.values()
        for ours, one in zip(row["auxo"], row["fedavg"])
    ]
    return Claim(
        name="natural",
        value=statistics.mean(ratios),
        unit="loss over that of one model",
        better="lower",
        baseline=Baseline(name="one model", value=1.0),
        samples=table,
        seeds=list(seeds),
    )


def _places(folder: Path) -> dict[str, Path]:
    return {
        "speakers": folder / "tinyshakespeare" / "input.txt",
        "raters": folder / "ml-latest-small",
    }


def _load(name: str, seed: int) -> tuple[FederatedData, ModelSpec]:
    folder = machine.data_dir()
    assert folder is not None
    path = _places(folder)[name]
    if name == "speakers":
        data = load_shakespeare_data(path, seed, per_client=400)
        bag = EmbeddingBag(vocabulary=data.vocabulary, dim=32, classes=data.classes)
        return data, ModelSpec(architecture=bag)
    data = load_movielens_data(path, seed)
    bag = EmbeddingBag(vocabulary=data.vocabulary, dim=8, classes=1)
    return data, ModelSpec(architecture=bag, task="regression")


def _run(name: str, method: str, seed: int, rounds: int) -> Row:
    torch.set_num_threads(1)
    data, spec = _load(name, seed)
    assert data.keys is not None
    train, held = _hold_out(natural_population(data.keys))
    per_round = min(100, train.n_clients // 2)
    local = LocalConfig(steps=20, batch_size=10, lr=0.5)

    def line() -> FedAvg:
        return FedAvg(spec, local, per_round)

    auxo = Auxo(AuxoConfig(), per_round, line)
    strategy = auxo if method == "auxo" else line()
    job = FederatedJob(strategy, train, seed)
    samples = data.samples()
    while job.round_id < rounds:
        run_round(job, samples)
    clients = np.arange(train.n_clients)
    leaves = [0] if method == "fedavg" else auxo.tree.leaves
    ids = leaves if method == "fedavg" else [leaf * STRIDE for leaf in leaves]
    rows = np.zeros(len(clients), dtype=np.int64)
    if method == "auxo":
        rows = np.searchsorted(leaves, auxo.best_leaves(clients))
    losses = []
    for number, model in enumerate(ids):
        own = np.concatenate([held[c] for c in clients[rows == number].tolist()] or [rows[:0]])
        index = torch.from_numpy(own.astype(np.int64))
        out = outputs(spec, strategy.weights(model), samples.inputs[index])
        loss = sample_losses(out, samples.targets[index], spec.task).numpy()
        sizes = [len(held[c]) for c in clients[rows == number].tolist()]
        losses += [part.mean() for part in np.split(loss, np.cumsum(sizes)[:-1]) if len(part)]
    ordered = np.sort(np.array(losses, dtype=np.float64))
    why = auxo.explain_split(auxo.tree.leaves[0])
    return {
        "loss": round(float(ordered.mean()), 4),
        "worst_tenth": round(float(ordered[-max(1, len(ordered) // 10) :].mean()), 4),
        "variance": round(float(ordered.var()), 4),
        "clients": train.n_clients,
        "cohorts": len(leaves),
        "why": None if why is None or method == "fedavg" else _short(why.verdict, why.stability),
    }


def _short(verdict: str, stability: dict[int, float]) -> str:
    means = ", ".join(f"K={k}: {value:.2f}" for k, value in stability.items())
    return f"{verdict}; stability {means}"


def _hold_out(population: Population) -> tuple[Population, list[npt.NDArray[np.int32]]]:
    """Every client without one sample in five, and those samples; in the data's order."""
    kept: list[IntArray] = []
    held = []
    for client in range(population.n_clients):
        own = population.samples(client)
        out = np.arange(len(own)) % HELD_OUT == HELD_OUT - 1
        kept.append(own[~out].astype(np.int64))
        held.append(own[out])
    sizes = np.array([len(part) for part in kept])
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    ids = np.concatenate(kept).astype(np.int32)
    return dataclasses.replace(population, offsets=offsets, sample_ids=ids), held
