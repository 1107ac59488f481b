"""Claims of Fed-ensemble: accuracy at equal communication, uncertainty, personal weights, cost.

The claims on accuracy and uncertainty share one matrix of paired runs (:mod:`.runs`): four data
sets, three splits, five seeds in the full profile, which takes about half an hour of one core;
``--partial FOLDER`` keeps finished cells, so that it may be interrupted.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from jobs.bench.fed_ensemble.cost import coverage_spread, round_cost_k5
from jobs.bench.fed_ensemble.rivals import against_rivals
from jobs.bench.fed_ensemble.runs import CLIENTS, LOCAL, PER_ROUND, data_sets, gains, results
from raysys.bench import Baseline, Claim, Profile, paired_claim
from raysys.errors import CapabilityError

CONFIG: dict[str, Any] = {
    "k": 3,
    "clients": CLIENTS,
    "clients_per_round": PER_ROUND,
    "local": dataclasses.asdict(LOCAL),
    "model": "MLP 64 hidden",
    "scored": "mean over the last 10 rounds; equal rounds, clients and bytes for every method",
}


def gain_at_equal_communication(profile: Profile) -> Claim:
    """Mean accuracy of K=3 over that of FedAvg, in points; EMA and snapshots beside it."""
    found = results(profile)
    marks = list(next(iter(found.values()))["accuracy"])
    by_mark = {mark: gains(found, "fedavg", mark) for mark in marks}
    last = by_mark[marks[-1]]
    by_data: dict[str, list[float]] = {}
    for label, gain in zip(found, last):
        by_data.setdefault(" ".join(label.split()[:2]), []).append(gain)
    return Claim(
        name="gain_at_equal_communication",
        value=statistics.mean(last),
        unit="points of accuracy over FedAvg",
        better="higher",
        baseline=Baseline(name="FedAvg", value=0.0),
        samples={
            "accuracy": {label: row["accuracy"] for label, row in found.items()},
            "gains": dict(zip(found, last)),
            "mean_by_split": {name: statistics.mean(rows) for name, rows in by_data.items()},
            "worst_split": min(statistics.mean(rows) for rows in by_data.values()),
            "mean_by_rounds": {mark: statistics.mean(rows) for mark, rows in by_mark.items()},
            "standard_error": _error(last),
            "gain_over_ema": statistics.mean(gains(found, "ema", marks[-1])),
            "gain_over_snapshots": statistics.mean(gains(found, "snapshots", marks[-1])),
        },
        seeds=list(range(profile.pick(1, 5))),
    )


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def ood_auroc(profile: Profile) -> Claim:
    """Telling Fashion-MNIST from MNIST: mutual information, against FedAvg's max-probability."""
    if not {"mnist", "fashion"} <= set(data_sets()):
        raise CapabilityError(
            "MNIST and Fashion-MNIST", "not in the data folder", "Point RAYSYS_DATA at them"
        )
    rows = {k: row for k, row in results(profile).items() if "novelty" in row}
    return paired_claim(
        "ood_auroc",
        "points of AUROC",
        "higher",
        ours=[100 * row["novelty"]["mutual_information"] for row in rows.values()],
        baseline_name="FedAvg, 1 - max probability",
        baseline=[100 * row["fedavg_novelty"]["max_probability"] for row in rows.values()],
        extra={
            "ensemble": {label: row["novelty"] for label, row in rows.items()},
            "fedavg": {label: row["fedavg_novelty"] for label, row in rows.items()},
        },
    )


def nll_after_temperature(profile: Profile) -> Claim:
    """Negative log-likelihood after one temperature, fitted on half of the test set, both sides."""
    found = results(profile)
    return paired_claim(
        "nll_after_temperature",
        "nats",
        "lower",
        ours=[row["nll"]["after"] for row in found.values()],
        baseline_name="FedAvg after its own temperature",
        baseline=[row["fedavg_nll"]["after"] for row in found.values()],
        extra={
            "ensemble": {label: row["nll"] for label, row in found.items()},
            "fedavg": {label: row["fedavg_nll"] for label, row in found.items()},
        },
    )


def personal_weights(profile: Profile) -> Claim:
    """Accuracy of personal over uniform weights on clients with two classes, in points."""
    found = {
        label: 100 * row["personal_gain"]
        for label, row in results(profile).items()
        if "personal_gain" in row
    }
    return Claim(
        name="personal_weights",
        value=statistics.mean(found.values()),
        unit="points of accuracy over uniform weights",
        better="higher",
        baseline=Baseline(name="uniform weights", value=0.0),
        samples=found,
    )


def bytes_per_update(profile: Profile) -> Claim:
    """Bytes that a client uploads per round, beside one model id; equal to FedAvg's to the byte."""
    pairs = {label: row["bytes_per_update"] for label, row in results(profile).items()}
    single, several = next(iter(pairs.values()))
    return Claim(
        name="bytes_per_update",
        value=several,
        unit="bytes",
        better="lower",
        baseline=Baseline(name="FedAvg", value=single),
        ratio=max(ours / other for other, ours in pairs.values()),
        samples=pairs,
    )


CLAIMS = {
    "gain_at_equal_communication": gain_at_equal_communication,
    "ood_auroc": ood_auroc,
    "nll_after_temperature": nll_after_temperature,
    "personal_weights": personal_weights,
    "against_rivals": against_rivals,
    "round_cost_k5": round_cost_k5,
    "bytes_per_update": bytes_per_update,
    "coverage_spread": coverage_spread,
}
