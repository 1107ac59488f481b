"""Time and energy to accuracy of a fleet of modelled phones, greedy against Swan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from raysys import machine
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import evaluate
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import (
    DataConfig,
    FederatedConfig,
    ModelConfig,
    load_data,
    make_line,
    make_population,
)
from raysys.federated.core.strategy import Strategy
from raysys.federated.swan.fleet import FleetConfig, FleetOutcome, run_fleet
from raysys.federated.swan.soc import BETAS, WORKLOADS, Workload

DEVICES, PER_ROUND = 2000, 50


def fleet(profile: Profile) -> Claim:
    """Greedy's simulated time to the target accuracy over Swan's, for networks and scenarios.

    Learning is real; time and energy of a step come from the SoC model. With healthy kernels
    (beta 0, and ResNet always) greedy's choice is the model's best one: those rows show what Swan's
    exploring costs, and a figure above 1 there would be luck with who answers first.
    """
    recipe, data, population, target = _task(profile)
    rows: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        for beta in BETAS:
            if beta == 0 and workload.depthwise == 0:
                continue  # without depthwise work, beta plays no part: one row stands for all
            if workload.depthwise == 0 and beta > 1:
                continue
            both = {
                policy: _run(recipe, data, population, workload, beta, policy, target, profile)
                for policy in ("greedy", "swan")
            }
            rows.append(_row(workload, beta, both["greedy"], both["swan"]))
    gains = [row["time_gain"] for row in rows]
    energy = [row["energy_gain"] for row in rows]
    return Claim(
        name="fleet",
        value=math.exp(sum(map(math.log, gains)) / len(gains)),
        unit="times less simulated time to accuracy, geometric mean (SoC model)",
        better="higher",
        baseline=Baseline(name="greedy, all fast cores", value=1.0),
        ratio=math.exp(sum(map(math.log, gains)) / len(gains)),
        samples={
            "rows": rows,
            "range": [min(gains), max(gains)],
            "where_greedy_is_best": [row["time_gain"] for row in rows if row["greedy_is_best"]],
            "energy_mean": math.exp(sum(map(math.log, energy)) / len(energy)),
            "energy_range": [min(energy), max(energy)],
            "devices": DEVICES,
            "data": data.name,
            "target": target,
        },
        seeds=[recipe.seed],
    )


def _task(profile: Profile) -> tuple[FederatedConfig, FederatedData, Population, float]:
    """MNIST with a client a phone where the data is there, else packaged digits."""
    folder = machine.data_dir()
    rich = folder is not None and (folder / "mnist-t10k").is_dir()
    clients = DEVICES if rich else 200
    recipe = FederatedConfig(
        clients_per_round=PER_ROUND,
        data=DataConfig(name="mnist" if rich else "digits"),
        partition=PartitionConfig(scheme="dirichlet", clients=clients, alpha=1.0),
        model=ModelConfig(kind="mlp", hidden=(64,)),
        local=LocalConfig(epochs=5, batch_size=8, lr=0.1),
    )
    data = load_data(recipe.data, recipe.seed, folder)
    target = profile.pick(0.80, 0.88) if rich else profile.pick(0.80, 0.90)
    return recipe, data, make_population(recipe, data), target


def _run(
    recipe: FederatedConfig,
    data: FederatedData,
    population: Population,
    workload: Workload,
    beta: float,
    policy: str,
    target: float,
    profile: Profile,
) -> FleetOutcome:
    spec = recipe.model.spec(data)
    test = data.test_samples()

    def accuracy_of(strategy: Strategy) -> float:
        return evaluate(spec, strategy.weights(0), test).accuracy

    config = FleetConfig(
        devices=DEVICES,
        per_round=PER_ROUND,
        beta=beta,
        policy=policy,
        rounds=profile.pick(150, 400),
        target=target,
        seed=recipe.seed,
    )
    line = make_line(recipe, spec)
    return run_fleet(config, workload, line, population, data.samples(), accuracy_of)


def _row(
    workload: Workload, beta: float, greedy: FleetOutcome, swan: FleetOutcome
) -> dict[str, Any]:
    def plain(outcome: FleetOutcome) -> dict[str, Any]:
        values = dataclasses.asdict(outcome)
        values.pop("history")
        return values

    return {
        "network": workload.name,
        "beta": beta if workload.depthwise else "any",
        "greedy_is_best": beta == 0 or workload.depthwise == 0,
        "time_gain": greedy.seconds / swan.seconds,
        "energy_gain": greedy.joules / swan.joules,
        "greedy": plain(greedy),
        "swan": plain(swan),
    }
