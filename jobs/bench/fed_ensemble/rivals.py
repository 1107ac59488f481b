"""Everything else that spends the same communication, and the dearer upper bound, on digits.

Equal rounds, clients per round and local epochs; each rival that has a knob of its own gets the
best of three values, chosen on another seed by the same score, and so does nothing of ours.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable

import numpy as np
import torch

from jobs.bench.fed_ensemble.runs import (
    LOCAL,
    PER_ROUND,
    Setting,
    Weights,
    load,
    model_for,
    split_of,
)
from jobs.bench.fed_ensemble.scores import accuracy, logits
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.runner import run_round
from raysys.federated.core.scaffold import Scaffold
from raysys.federated.core.server import Adam, Yogi
from raysys.federated.core.strategy import Strategy
from raysys.federated.fed_ensemble.baselines import Snapshots, WeightAverage
from raysys.federated.fed_ensemble.distillation import distil
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.fedbe import FedBe
from raysys.federated.fed_ensemble.prediction import predict

K, LAST, TUNING_SEED = 3, 10, 100
ETAS = (0.003, 0.01, 0.03)
Make = Callable[[ModelSpec, FederatedData], Strategy]


def _avg(spec: ModelSpec, _: FederatedData) -> Strategy:
    return FedAvg(spec, LOCAL, PER_ROUND)


def _prox(mu: float, spec: ModelSpec, _: FederatedData) -> Strategy:
    return FedAvg(spec, dataclasses.replace(LOCAL, prox_mu=mu), PER_ROUND)


def _adaptive(kind: type[Adam], eta: float, spec: ModelSpec, _: FederatedData) -> Strategy:
    return FedAvg(spec, LOCAL, PER_ROUND, kind(eta=eta))


def _scaffold(spec: ModelSpec, _: FederatedData) -> Strategy:
    return Scaffold(spec, LOCAL, PER_ROUND)


def _fedbe(spec: ModelSpec, data: FederatedData) -> Strategy:
    """FedBE's unlabelled server data: half of the test images, without their labels."""
    server = data.test_inputs[: len(data.test_inputs) // 2]
    return FedBe(spec, LOCAL, PER_ROUND, server, every=10)


def _ensemble(config: EnsembleConfig, spec: ModelSpec, _: FederatedData) -> Strategy:
    return FedEnsemble(config, PER_ROUND, lambda: FedAvg(spec, LOCAL, PER_ROUND))


RIVALS: dict[str, list[Make]] = {
    "fedavg": [_avg],
    "fedprox": [functools.partial(_prox, mu) for mu in (0.001, 0.01, 0.1)],
    "scaffold": [_scaffold],
    "fedadam": [functools.partial(_adaptive, Adam, eta) for eta in ETAS],
    "fedyogi": [functools.partial(_adaptive, Yogi, eta) for eta in ETAS],
    "fedbe": [_fedbe],
    "ensemble": [functools.partial(_ensemble, EnsembleConfig(k=K))],
    "ensemble, random models": [functools.partial(_ensemble, EnsembleConfig(k=K, strata="random"))],
    "ensemble, warm start": [functools.partial(_ensemble, EnsembleConfig(k=K, warm_rounds=60))],
    "ensemble, shared trunk": [functools.partial(_ensemble, EnsembleConfig(k=K, share="trunk"))],
}


def against_rivals(profile: Profile) -> Claim:
    """Accuracy of K=3 on digits in its three splits, beside every baseline and variant."""
    torch.set_num_threads(1)
    rounds = profile.pick(100, 600)
    seeds = profile.pick([0], [0, 1, 2])
    found: dict[str, list[float]] = {}
    for scheme in ("iid", "dirichlet", "shards"):
        cell = functools.partial(Setting, name="digits", scheme=scheme, marks=(rounds,))
        chosen = {
            name: makes[0] if len(makes) == 1 else _best(makes, cell(seed=TUNING_SEED))
            for name, makes in RIVALS.items()
        }
        for seed in seeds:
            for name, make in chosen.items():
                for view, score in _score(make, cell(seed=seed), name).items():
                    found.setdefault(view, []).append(score)
            found.setdefault(f"{K} runs at {K} times the cost", []).append(
                _independent(cell(seed=seed))
            )
    means = {name: 100 * statistics.mean(values) for name, values in found.items()}
    return Claim(
        name="against_rivals",
        value=means["ensemble"],
        unit="% accuracy",
        better="higher",
        baseline=Baseline(name="FedAvg", value=means["fedavg"]),
        ratio=means["ensemble"] / means["fedavg"],
        samples={"mean": means, "cells": found, "rounds": rounds},
        seeds=seeds,
    )


def _best(makes: list[Make], setting: Setting) -> Make:
    return max(makes, key=lambda make: _score(make, setting, "tuned")["tuned"])


def _score(make: Make, setting: Setting, name: str) -> dict[str, float]:
    """Mean accuracy of the last ten rounds, by the views of the run that cost nothing more."""
    data = load(setting.name, setting.seed)
    spec = model_for(data)
    strategy = make(spec, data)
    job = FederatedJob(strategy, split_of(setting, data), setting.seed)
    samples = data.samples()
    average, snapshots = WeightAverage(0.9), Snapshots(K)
    scores: dict[str, list[float]] = {}
    rounds = max(setting.marks)
    for round_id in range(rounds):
        run_round(job, samples)
        average.add(strategy.weights(0))
        snapshots.add(strategy.weights(0))
        if round_id < rounds - LAST:
            continue
        views = {name: _members(strategy)}
        if name == "fedavg":
            views |= {"fedavg, ema": average.weights()[None], "snapshots": snapshots.stacked()}
        for view, members in views.items():
            scores.setdefault(view, []).append(accuracy(spec, members, data))
    if name == "ensemble":
        scores["ensemble, distilled"] = [_student(spec, _members(strategy), data)]
    return {view: statistics.mean(values) for view, values in scores.items()}


def _members(strategy: Strategy) -> Weights:
    if isinstance(strategy, FedEnsemble | FedBe):
        return strategy.stacked()
    return strategy.weights(0)[None]


def _student(spec: ModelSpec, members: Weights, data: FederatedData) -> float:
    """Accuracy of one model distilled on half of the test images, on the other half."""
    half = len(data.test_inputs) // 2
    soft = predict(logits(spec, members, data.test_inputs[:half])).probabilities
    student = distil(spec, members[0], data.test_inputs[:half], soft)
    rest = dataclasses.replace(
        data, test_inputs=data.test_inputs[half:], test_targets=data.test_targets[half:]
    )
    return accuracy(spec, student[None], rest)


def _independent(setting: Setting) -> float:
    """Ensemble of K separate FedAvg runs, each with the whole budget: the upper bound."""
    data = load(setting.name, setting.seed)
    spec, samples = model_for(data), data.samples()
    population = split_of(setting, data)
    members = []
    for member in range(K):
        job = FederatedJob(FedAvg(spec, LOCAL, PER_ROUND), population, setting.seed + 1000 * member)
        for _ in range(max(setting.marks)):
            run_round(job, samples)
        members.append(job.strategy.weights(0))
    return accuracy(spec, np.stack(members), data)
