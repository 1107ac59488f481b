"""Fed-ensemble: three models at the communication of one, and a sense of what they do not know."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import ray
import torch

from actors.federated.driver import FederatedRun
from actors.federated.ensemble import build_ensemble
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import FederatedConfig, load_data, make_population
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig
from raysys.federated.fed_ensemble.prediction import Prediction, auroc, predict
from raysys.report import Plot, new_figure

K = 3
FloatInputs = npt.NDArray[np.float32]


def run(context: StageContext) -> StageResult:
    """Train FedAvg and the ensemble on the same rounds; compare accuracy and novelty detection."""
    rounds = 30 if context.smoke else 300
    recipe = FederatedConfig(
        seed=context.seed,
        clients_per_round=24,
        partition=PartitionConfig(scheme="shards", clients=100, classes_per_client=2),
    )
    data = load_data(recipe.data, recipe.seed, None)
    spec = recipe.model.spec(data)
    context.progress(0, 2, "FedAvg")
    single = _train(recipe, data, spec, None, rounds)
    context.progress(1, 2, f"{K} models at the cost of one")
    several = _train(recipe, data, spec, EnsembleConfig(k=K), rounds)
    foreign = np.ascontiguousarray(np.rot90(data.test_inputs, axes=(2, 3)))
    inside = [_predict(spec, members, data.test_inputs) for members in (single, several)]
    outside = [_predict(spec, members, foreign) for members in (single, several)]
    accuracy = [float((p.labels == data.test_targets).mean()) for p in inside]
    novelty = [
        auroc(-inside[0].probabilities.max(axis=1), -outside[0].probabilities.max(axis=1)),
        auroc(inside[1].total_entropy, outside[1].total_entropy),
    ]
    names = (f"test accuracy, {rounds} rounds, equal bytes", "AUROC, digits against turned digits")
    return StageResult(
        rows=[
            Row(
                measure=name,
                unit="share",
                better="higher",
                baseline_name="FedAvg",
                baseline=pair[0],
                ours=pair[1],
            )
            for name, pair in zip(names, (accuracy, novelty))
        ],
        plots=[_histogram(inside[1], outside[1])],
        notes=[
            f"{K} models of one architecture; 24 of 100 clients a round, each trains one model.",
            "Turned digits are the test set rotated by 90 degrees; FedAvg scores by 1 - max p.",
        ],
    )


def _train(
    recipe: FederatedConfig,
    data: FederatedData,
    spec: ModelSpec,
    ensemble: EnsembleConfig | None,
    rounds: int,
) -> FloatInputs:
    """Final weights, float32 [models, P]."""
    make = None if ensemble is None else functools.partial(build_ensemble, recipe, ensemble, spec)
    population = make_population(recipe, data)
    federated = FederatedRun(recipe, data, population, spec, workers=2, worker_cpus=0, make=make)
    try:
        for _ in federated.rounds(rounds):
            pass
        members = 1 if ensemble is None else ensemble.k
        return np.stack([ray.get(federated.actor.weights.remote(k)) for k in range(members)])
    finally:
        federated.close()


def _predict(spec: ModelSpec, members: FloatInputs, inputs: FloatInputs) -> Prediction:
    x = torch.from_numpy(inputs)
    return predict(np.stack([outputs(spec, row, x).numpy() for row in members]))


def _histogram(inside: Prediction, outside: Prediction) -> Plot:
    figure, axes = new_figure()
    bins = np.linspace(0, float(np.log(10)), 30)
    axes.hist(inside.total_entropy, bins=bins, alpha=0.6, density=True, label="digits")
    axes.hist(outside.total_entropy, bins=bins, alpha=0.6, density=True, label="turned digits")
    axes.set_xlabel("entropy of the ensemble's prediction, nats")
    axes.set_ylabel("density")
    axes.legend()
    return Plot(
        title="The ensemble knows what it has not seen",
        caption="Entropy of predictions on the test digits and on the same digits, turned.",
        figure=figure,
    )


STAGE = Stage(
    name="fed_ensemble",
    title="Fed-ensemble",
    problem=(
        "One federated model gives no honest uncertainty, and an ensemble costs K times as much. "
        "Here each client trains one of K models a round, by a permutation of its own."
    ),
    command="raysys federate --set ensemble.k=3",
    run=run,
)
