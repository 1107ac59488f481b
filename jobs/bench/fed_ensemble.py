"""Claims of Fed-ensemble: accuracy at equal communication, uncertainty, personal weights, cost."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from jobs.bench.fed_ensemble_runs import (
    CLIENTS,
    LOCAL,
    PER_ROUND,
    SCHEMES,
    PairedRun,
    data_sets,
    load,
    logits,
    paired_run,
)
from jobs.bench.federated_ray import SPEC, digits_population
from raysys.bench import Baseline, Claim, Profile, paired_claim
from raysys.errors import CapabilityError
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.runner import run_round, run_rounds
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.prediction import (
    auroc,
    fit_temperature,
    loss_by_temperature,
    nll,
    personal_weights,
    predict,
    sharpen,
    softmax,
)

CONFIG: dict[str, Any] = {
    "k": 3,
    "clients": CLIENTS,
    "clients_per_round": PER_ROUND,
    "local": {"epochs": 1, "batch_size": 10, "lr": 0.1},
    "model": "MLP 64 hidden; fashion-cnn: 8 and 16 channels",
    "splits": list(SCHEMES),
    "scored": "mean over the last 10 rounds; equal rounds, clients and bytes for every method",
}


def runs(profile: Profile) -> dict[str, PairedRun]:
    """All paired runs of a profile, by name; computed once."""
    seeds = profile.pick(1, 5)
    rounds = profile.pick(300, 400)
    names = [name for name in data_sets() if profile.full or not name.endswith("-cnn")]
    return {
        f"{name} {scheme} {seed}": paired_run(name, scheme, seed, rounds)
        for name in names
        for scheme in SCHEMES
        for seed in range(seeds)
    }


def gain_at_equal_communication(profile: Profile) -> Claim:
    """Mean accuracy of K=3 over that of FedAvg, in points; EMA and snapshots beside it."""
    found = runs(profile)
    table = {name: run.accuracy for name, run in found.items()}
    gains = [100 * (row["ensemble"] - row["fedavg"]) for row in table.values()]
    means = {
        m: statistics.mean(row[m] for row in table.values()) for m in next(iter(table.values()))
    }
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return Claim(
        name="gain_at_equal_communication",
        value=statistics.mean(gains),
        unit="points of accuracy over FedAvg",
        better="higher",
        baseline=Baseline(name="FedAvg", value=0.0),
        samples={
            "accuracy": table,
            "mean_accuracy": means,
            "gains": gains,
            "worst_gain": min(gains),
            "standard_error": error,
            "gain_over_ema": 100 * (means["ensemble"] - means["ema"]),
            "gain_over_snapshots": 100 * (means["ensemble"] - means["snapshots"]),
        },
        seeds=list(range(profile.pick(1, 5))),
    )


def ood_auroc(profile: Profile) -> Claim:
    """Telling Fashion-MNIST from MNIST: mutual information and entropy, against max-probability."""
    if "mnist" not in data_sets() or "fashion" not in data_sets():
        raise CapabilityError(
            "MNIST and Fashion-MNIST", "not in the data folder", "Point RAYSYS_DATA at them"
        )
    ours, baseline, entropies = [], [], []
    for name, run in runs(profile).items():
        if not name.startswith("mnist"):
            continue
        foreign = load("fashion", 0).test_inputs
        inside = predict(logits(run.spec, run.members, run.data.test_inputs))
        outside = predict(logits(run.spec, run.members, foreign))
        ours.append(100 * auroc(inside.mutual_information, outside.mutual_information))
        entropies.append(100 * auroc(inside.total_entropy, outside.total_entropy))
        single = [
            -softmax(logits(run.spec, run.fedavg[None], x)[0].astype(np.float64)).max(axis=1)
            for x in (run.data.test_inputs, foreign)
        ]
        baseline.append(100 * auroc(single[0], single[1]))
    return paired_claim(
        "ood_auroc",
        "points of AUROC",
        "higher",
        ours=ours,
        baseline_name="FedAvg, 1 - max probability",
        baseline=baseline,
        extra={"ensemble_total_entropy": entropies},
    )


def nll_after_temperature(profile: Profile) -> Claim:
    """Negative log-likelihood after one temperature, fitted on half of the test set, both sides."""
    ours, baseline, before = [], [], []
    for run in runs(profile).values():
        labels = run.data.test_targets
        half = len(labels) // 2
        pair = [
            predict(logits(run.spec, members, run.data.test_inputs)).probabilities
            for members in (run.members, run.fedavg[None])
        ]
        before.append([nll(p[half:], labels[half:]) for p in pair])
        ours.append(_calibrated(pair[0], labels, half))
        baseline.append(_calibrated(pair[1], labels, half))
    return paired_claim(
        "nll_after_temperature",
        "nats",
        "lower",
        ours=ours,
        baseline_name="FedAvg after its own temperature",
        baseline=baseline,
        extra={"before_ensemble_and_fedavg": before},
    )


def _calibrated(probabilities: Any, labels: Any, half: int) -> float:
    """Fit on the first half, dealt to ten clients that return losses only; score on the second."""
    parts = np.array_split(np.arange(half), 10)
    total = np.sum([loss_by_temperature(probabilities[p], labels[p]) for p in parts], axis=0)
    temperature = fit_temperature(total, half, len(np.unique(labels[:half])))
    return nll(sharpen(probabilities[half:], temperature), labels[half:])


def personal_gain(profile: Profile) -> Claim:
    """Accuracy of personal over uniform weights on clients with two classes, in points.

    Each client validates on 20 test samples of its classes and is scored on the others.
    """
    gains: dict[str, float] = {}
    for name, run in runs(profile).items():
        if " shards " in name:
            gains[name] = 100 * _personal_gain(run)
    return Claim(
        name="personal_weights",
        value=statistics.mean(gains.values()),
        unit="points of accuracy over uniform weights",
        better="higher",
        baseline=Baseline(name="uniform weights", value=0.0),
        samples=gains,
    )


def _personal_gain(run: PairedRun) -> float:
    probabilities = softmax(logits(run.spec, run.members, run.data.test_inputs).astype(np.float64))
    labels = run.data.test_targets
    rng = np.random.default_rng(0)
    gaps = []
    for client in range(run.population.n_clients):
        own = np.unique(run.data.targets[run.population.samples(client)])
        rows = rng.permutation(np.flatnonzero(np.isin(labels, own)))
        validation, rest = rows[:20], rows[20:]
        losses = -np.log(np.maximum(probabilities[:, validation, labels[validation]].T, 1e-12))
        mix = personal_weights(losses)
        personal = np.tensordot(mix, probabilities[:, rest], axes=1).argmax(axis=1)
        uniform = probabilities[:, rest].mean(axis=0).argmax(axis=1)
        gaps.append((personal == labels[rest]).mean() - (uniform == labels[rest]).mean())
    return float(np.mean(gaps))


def round_cost_k5(profile: Profile) -> Claim:
    """CPU time of a round with K=5 over that of FedAvg: 100 of 1,000 digits clients, MLP."""
    torch.set_num_threads(1)
    data = load_digits_data(0)
    samples = data.samples()
    population = digits_population(1000, len(data.targets))
    jobs = {
        1: FederatedJob(FedAvg(SPEC, LOCAL, 100), population),
        5: FederatedJob(
            FedEnsemble(EnsembleConfig(k=5), 100, lambda: FedAvg(SPEC, LOCAL, 100)), population
        ),
    }
    times: dict[int, list[float]] = {k: [] for k in jobs}
    for repeat in range(profile.pick(100, 300)):
        for k, job in jobs.items() if repeat % 2 else reversed(jobs.items()):
            begin = time.process_time()
            run_round(job, samples)
            times[k].append(1000 * (time.process_time() - begin))
    return paired_claim(
        "round_cost_k5",
        "ms of CPU per round",
        "lower",
        ours=times[5][5:],
        baseline_name="FedAvg round",
        baseline=times[1][5:],
        seeds=[0],
    )


def bytes_per_update(profile: Profile) -> Claim:
    """Bytes that a client uploads per round, beside one model id; equal to FedAvg's to the byte."""
    run = next(iter(runs(profile).values()))
    single, several = run.bytes_per_update
    return Claim(
        name="bytes_per_update",
        value=several,
        unit="bytes",
        better="lower",
        baseline=Baseline(name="FedAvg", value=single),
        ratio=several / single,
    )


def coverage_spread(profile: Profile) -> Claim:
    """Largest difference between models in one client's accepted updates, a tenth dropping out.

    1 is exact: an age that is not complete has visited some models only.
    """
    data = load_digits_data(0)
    samples = data.samples()
    population = digits_population(100, len(data.targets))
    broken = torch.from_numpy(population.samples(0).astype(np.int64))
    samples.inputs[broken] = float("inf")  # whoever owns these samples delivers NaN
    ensemble = FedEnsemble(EnsembleConfig(k=3), 40, lambda: FedAvg(SPEC, LOCAL, 40))
    job = FederatedJob(ensemble, population, 0, screen=ScreenConfig(min_fraction=0.0))
    reports = run_rounds(job, samples, profile.pick(60, 300))
    coverage = ensemble.coverage()
    dropped = sum(report.counts["nonfinite"] for report in reports)
    return Claim(
        name="coverage_spread",
        value=float((coverage.max(axis=1) - coverage.min(axis=1)).max()),
        unit="updates",
        better="lower",
        samples={"accepted": int(coverage.sum()), "dropped": dropped},
        seeds=[0],
    )


CLAIMS = {
    "gain_at_equal_communication": gain_at_equal_communication,
    "ood_auroc": ood_auroc,
    "nll_after_temperature": nll_after_temperature,
    "personal_weights": personal_gain,
    "round_cost_k5": round_cost_k5,
    "bytes_per_update": bytes_per_update,
    "coverage_spread": coverage_spread,
}
