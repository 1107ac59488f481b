"""What the ensemble costs and what its schedule guarantees: a round's time, and coverage."""

from __future__ import annotations

import time

import numpy as np
import torch

from jobs.bench.federated.on_ray import LOCAL, SPEC, digits_population
from raysys.bench import Claim, Profile, paired_claim
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.runner import run_round, run_rounds
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble


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
