"""Auxo: three hidden groups of clients become three cohorts while they train."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import ray

from actors.federated.cohorts import build_auxo
from actors.federated.driver import FederatedRun
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.drawing import tree_plot
from raysys.federated.auxo.explain import explain
from raysys.federated.auxo.planted import CohortScore, Planted, PlantedConfig, plant, score_clients
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.recipe import FederatedConfig, make_job

GROUPS = 3
AUXO = AuxoConfig(k_max=4, start_round=3, sketch_dim=64)
PLANTED = PlantedConfig(kind="labels", groups=GROUPS, clients=300, samples=30, alpha=10.0)


def run(context: StageContext) -> StageResult:
    """Train one model and cohorts on the same clients; compare accuracy, worst tenth, groups."""
    rounds = 6 if context.smoke else 100
    planted = plant(load_digits_data(context.seed, image=True), PLANTED, context.seed)
    recipe = FederatedConfig(seed=context.seed, clients_per_round=48)
    spec = recipe.model.spec(planted.data)
    context.progress(0, 2, "one model for all")
    single = _train(recipe, planted, spec, None, rounds)
    context.progress(1, 2, "cohorts")
    strategy = _train(recipe, planted, spec, AUXO, rounds)
    assert isinstance(strategy, Auxo)
    leaves = np.array(strategy.tree.leaves)
    everybody = np.arange(PLANTED.clients)
    models = np.stack([strategy.weights(int(leaf) * STRIDE) for leaf in leaves])
    row = np.searchsorted(leaves, strategy.best_leaves(everybody))
    ours = score_clients(planted, spec, models, row, everybody)
    one = score_clients(planted, spec, single.weights(0)[None], np.zeros_like(row), everybody)
    facts = explain(strategy)
    split = [event["round"] for event in facts["events"] if event["event"] == "split"]
    return StageResult(
        rows=_rows(one, ours),
        plots=[tree_plot(facts)],
        notes=[
            f"{PLANTED.clients} clients in {GROUPS} groups that name the ten digits differently;"
            f" 48 a round, {rounds} rounds, equal devices and downloads for both.",
            f"Split after round {split}." if split else "No split in so few rounds.",
        ],
    )


def _train(
    recipe: FederatedConfig,
    planted: Planted,
    spec: ModelSpec,
    auxo: AuxoConfig | None,
    rounds: int,
) -> Any:
    """The strategy after training on Ray."""
    make = functools.partial(make_job, recipe, spec)
    if auxo is not None:
        make = functools.partial(build_auxo, recipe, auxo, None, spec)
    federated = FederatedRun(
        recipe, planted.data, planted.population, spec, workers=2, worker_cpus=0, make=make
    )
    try:
        for _ in federated.rounds(rounds):
            pass
        job = make(planted.population)
        job.load(ray.get(federated.actor.state.remote()))
        return job.strategy
    finally:
        federated.close()


def _rows(one: CohortScore, ours: CohortScore) -> list[Row]:
    figures = (
        ("mean accuracy over clients", one.mean, ours.mean),
        ("accuracy of the worst tenth of clients", one.worst, ours.worst),
        ("agreement with the hidden groups (ARI)", one.ari, ours.ari),
    )
    return [
        Row(
            measure=name,
            unit="share",
            better="higher",
            baseline_name="FedAvg, one model",
            baseline=baseline,
            ours=value,
        )
        for name, baseline, value in figures
    ]


STAGE = Stage(
    name="auxo",
    title="Auxo",
    problem=(
        "Clients fall into groups whose data contradict one another, and one model serves none of"
        " them. Auxo finds the groups from the updates that it gets anyway, and splits the model."
    ),
    command="raysys federate --set auxo.k_max=6",
    run=run,
)
