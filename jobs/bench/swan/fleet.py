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
SMOOTH = 5  # rounds whose mean accuracy must reach the target: single rounds are lucky


def fleet(profile: Profile) -> Claim:
    """Greedy's simulated time to the target accuracy over Swan's, for networks and scenarios.

    Learning is real; time and energy of a step come from the SoC model. With healthy kernels
    (beta 0, and ResNet always) greedy's choice is the model's best one: those rows show what Swan's
    exploring costs, and a figure above 1 there would be luck with who answers first.
    """
    seeds = list(range(profile.pick(1, 3)))
    tasks = [_task(profile, seed) for seed in seeds]
    rows: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        for beta in BETAS:
            if workload.depthwise == 0 and beta > 0:
                continue  # without depthwise work, beta plays no part: one row stands for all
            pairs = [
                [_run(task, workload, beta, policy, profile) for policy in ("greedy", "swan")]
                for task in tasks
            ]
            rows.append(_row(workload, beta, pairs))
    gains = [row["time_gain"] for row in rows]
    energy = [row["energy_gain"] for row in rows]
    return Claim(
        name="fleet",
        value=_geometric(gains),
        unit="times less simulated time to accuracy, geometric mean (SoC model)",
        better="higher",
        baseline=Baseline(name="greedy, all fast cores", value=1.0),
        ratio=_geometric(gains),
        samples={
            "rows": rows,
            "range": [min(gains), max(gains)],
            "where_greedy_is_best": [row["time_gain"] for row in rows if row["greedy_is_best"]],
            "energy_mean": _geometric(energy),
            "energy_range": [min(energy), max(energy)],
            "devices": DEVICES,
            "data": tasks[0].data.name,
            "target": tasks[0].target,
            "smooth": SMOOTH,
        },
        seeds=seeds,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is learned, with one seed for data, phones and links."""

    recipe: FederatedConfig
    data: FederatedData
    population: Population
    target: float


def _task(profile: Profile, seed: int) -> Task:
    """MNIST with a client a phone where the data is there, else packaged digits."""
    folder = machine.data_dir()
    rich = folder is not None and (folder / "mnist-t10k").is_dir()
    clients = DEVICES if rich else 200
    recipe = FederatedConfig(
        seed=seed,
        clients_per_round=PER_ROUND,
        data=DataConfig(name="mnist" if rich else "digits"),
        partition=PartitionConfig(scheme="dirichlet", clients=clients, alpha=1.0),
        model=ModelConfig(kind="mlp", hidden=(64,)),
        local=LocalConfig(epochs=5, batch_size=8, lr=0.1),
    )
    data = load_data(recipe.data, recipe.seed, folder)
    target = profile.pick(0.80, 0.88) if rich else profile.pick(0.80, 0.90)
    return Task(recipe, data, make_population(recipe, data), target)


def _run(
    task: Task, workload: Workload, beta: float, policy: str, profile: Profile
) -> FleetOutcome:
    spec = task.recipe.model.spec(task.data)
    test = task.data.test_samples()

    def accuracy_of(strategy: Strategy) -> float:
        return evaluate(spec, strategy.weights(0), test).accuracy

    config = FleetConfig(
        devices=DEVICES,
        per_round=PER_ROUND,
        beta=beta,
        policy=policy,
        rounds=profile.pick(150, 400),
        target=task.target,
        smooth=SMOOTH,
        seed=task.recipe.seed,
    )
    line = make_line(task.recipe, spec)
    samples = task.data.samples()
    return run_fleet(config, workload, line, task.population, samples, accuracy_of)


def _row(workload: Workload, beta: float, pairs: list[list[FleetOutcome]]) -> dict[str, Any]:
    """Greedy's figures over Swan's, geometric means over the seeds."""

    def plain(outcome: FleetOutcome) -> dict[str, Any]:
        values = dataclasses.asdict(outcome)
        values.pop("history")
        return values

    times = [greedy.seconds / swan.seconds for greedy, swan in pairs]
    rounds = [
        (greedy.seconds / greedy.rounds) / (swan.seconds / swan.rounds) for greedy, swan in pairs
    ]
    return {
        "network": workload.name,
        "beta": beta if workload.depthwise else "any",
        "greedy_is_best": beta == 0 or workload.depthwise == 0,
        "time_gain": _geometric(times),
        "time_gain_by_seed": times,
        "round_gain": _geometric(rounds),
        "energy_gain": _geometric([greedy.joules / swan.joules for greedy, swan in pairs]),
        "greedy": [plain(greedy) for greedy, _ in pairs],
        "swan": [plain(swan) for _, swan in pairs],
    }


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
