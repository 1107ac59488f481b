"""Everything else that spends the same communication, and the dearer upper bound, on digits.

Equal rounds, clients per round and local epochs; each rival that has a knob of its own gets the
best of three values, chosen on another seed by the same score, and so does nothing of ours. With
``--partial FOLDER`` every run is a piece of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

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
from jobs.bench.pieces import Piece, measure_pieces
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


def _knob(name: str, values: tuple[float, ...], make: Callable[..., Strategy]) -> dict[str, Make]:
    return {f"{name} {value}": functools.partial(make, value) for value in values}


def _our(**changes: Any) -> dict[str, Make]:
    return {"": functools.partial(_ensemble, EnsembleConfig(k=K, **changes))}


# By name: the values of a rival's own knob, of which the best is taken.
RIVALS: dict[str, dict[str, Make]] = {
    "fedavg": {"": _avg},
    "fedprox": _knob("mu", (0.001, 0.01, 0.1), _prox),
    "scaffold": {"": _scaffold},
    "fedadam": _knob("eta", ETAS, functools.partial(_adaptive, Adam)),
    "fedyogi": _knob("eta", ETAS, functools.partial(_adaptive, Yogi)),
    "fedbe": {"": _fedbe},
    "ensemble": _our(),
    "ensemble, random models": _our(strata="random"),
    "ensemble, warm start": _our(warm_rounds=60),
    "ensemble, shared trunk": _our(share="trunk"),
}
UPPER = f"{K} runs at {K} times the cost"


def against_rivals(profile: Profile) -> Claim:
    """Accuracy of K=3 on digits in its three splits, beside every baseline and variant."""
    torch.set_num_threads(1)
    rounds = profile.pick(100, 600)
    seeds = profile.pick([0], [0, 1, 2])
    found: dict[str, list[float]] = {}
    chosen: dict[str, dict[str, str]] = {}
    for scheme in ("iid", "dirichlet", "shards"):
        cell = functools.partial(Setting, name="digits", scheme=scheme, marks=(rounds,))
        chosen[scheme] = _tune(profile, cell(seed=TUNING_SEED))
        pieces = [
            piece
            for seed in seeds
            for piece in (
                *(_piece(cell(seed=seed), name, knob) for name, knob in chosen[scheme].items()),
                Piece(
                    f"rival-{scheme}-{seed}-upper",
                    {**dataclasses.asdict(cell(seed=seed)), "rival": UPPER},
                    functools.partial(_independent, cell(seed=seed)),
                ),
            )
        ]
        for scores in measure_pieces(profile.partial, pieces):
            for view, score in scores.items():
                found.setdefault(view, []).append(score)
    means = {name: 100 * statistics.mean(values) for name, values in found.items()}
    return Claim(
        name="against_rivals",
        value=means["ensemble"],
        unit="% accuracy",
        better="higher",
        baseline=Baseline(name="FedAvg", value=means["fedavg"]),
        ratio=means["ensemble"] / means["fedavg"],
        samples={"mean": means, "cells": found, "rounds": rounds, "knobs": chosen},
        seeds=seeds,
    )


def _tune(profile: Profile, setting: Setting) -> dict[str, str]:
    """The best value of every rival's knob, on a seed that is not scored."""
    tried = [(n, knob) for n, makes in RIVALS.items() if len(makes) > 1 for knob in makes]
    pieces = [_piece(setting, name, knob) for name, knob in tried]
    scores = measure_pieces(profile.partial, pieces)
    chosen = {name: next(iter(makes)) for name, makes in RIVALS.items()}
    best = dict.fromkeys(chosen, -1.0)
    for (name, knob), score in zip(tried, scores):
        if score[name] > best[name]:
            chosen[name], best[name] = knob, score[name]
    return chosen


def _piece(setting: Setting, name: str, knob: str) -> Piece:
    words = f"rival {setting.scheme} {setting.seed} {name} {knob}".replace(",", "").split()
    return Piece(
        "-".join(words),
        {**dataclasses.asdict(setting), "rival": name, "knob": knob},
        functools.partial(_score, RIVALS[name][knob], setting, name),
    )


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


def _independent(setting: Setting) -> dict[str, float]:
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
    return {UPPER: accuracy(spec, np.stack(members), data)}
