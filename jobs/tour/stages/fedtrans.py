"""FedTrans: a family of models that fits unequal devices, against one small model for all."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from actors.federated.cohorts import build_family
from actors.federated.driver import FederatedRun
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import FederatedConfig, load_data, make_population
from raysys.federated.fedtrans.cells import Dense
from raysys.federated.fedtrans.config import FedTransConfig, GrowthConfig
from raysys.federated.fedtrans.drawing import genealogy
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.recipe import simulated_speeds
from raysys.report import Plot, new_figure

PER_ROUND, SPREAD, WIDTH = 20, 32.0, 4
LOCAL = LocalConfig(steps=20, batch_size=10, lr=0.05)


def run(context: StageContext) -> StageResult:
    """Train a growing family and the first model alone on the same unequal devices."""
    rounds = 40 if context.smoke else 300
    recipe = FederatedConfig(
        seed=context.seed,
        clients_per_round=PER_ROUND,
        local=LOCAL,
        partition=PartitionConfig(scheme="dirichlet", clients=100, alpha=0.5),
    )
    data = load_data(recipe.data, recipe.seed, None)
    shape = tuple(int(side) for side in data.inputs.shape[1:])
    net = CellNet(shape=shape, cells=(Dense(width=WIDTH),), classes=data.classes or 0)
    population = make_population(recipe, data)
    rates = simulated_speeds(population.n_clients, net.macs(), SPREAD, context.seed)
    population = dataclasses.replace(population, rate_mac_s=rates)
    pace = {"delta": 4, "gamma": 2, "beta": 0.05} if context.smoke else {"delta": 10, "gamma": 5}
    growth = GrowthConfig(**pace, end_round=rounds * 2 // 3)
    curves, macs = {}, {}
    for number, (name, config) in enumerate(
        {
            "one small model": FedTransConfig(growth=GrowthConfig(enabled=False)),
            "FedTrans": FedTransConfig(growth=growth),
        }.items()
    ):
        context.progress(number, 2, name)
        make = functools.partial(build_family, recipe, config, None, net)
        federated = FederatedRun(
            recipe, data, population, net.spec(), workers=2, worker_cpus=0, make=make,
            evaluate_every=10,
        )  # fmt: skip
        try:
            summaries = list(federated.rounds(rounds))
            facts = federated.explain()  # of the last one, the family
        finally:
            federated.close()
        curves[name] = [(s.round_id + 1, s.score.accuracy) for s in summaries if s.score]
        macs[name] = float(sum(s.macs for s in summaries))
    small, family = (curves[name][-1][1] for name in ("one small model", "FedTrans"))
    return StageResult(
        rows=[
            Row(
                measure=f"accuracy of the deployed models, devices 1:{SPREAD:.0f}, {rounds} rounds",
                unit="share",
                better="higher",
                baseline_name="one model that all can run",
                baseline=small,
                ours=family,
            ),
            Row(
                measure="work of all devices",
                unit="multiply-accumulates",
                better="lower",
                baseline_name="one model that all can run",
                baseline=macs["one small model"],
                ours=macs["FedTrans"],
            ),
        ],
        plots=[_plot(curves), genealogy(facts)],
        notes=[
            "Digits over 100 simulated clients, Dirichlet 0.5; accuracy is the mean over clients."
        ],
    )


def _plot(curves: dict[str, list[tuple[int, float]]]) -> Plot:
    figure, axes = new_figure()
    for name, points in curves.items():
        found: npt.NDArray[np.float64] = np.array(points)
        axes.plot(found[:, 0], found[:, 1], label=name)
    axes.set_xlabel("round")
    axes.set_ylabel("mean accuracy over clients")
    axes.legend()
    return Plot(
        title="A family of models grows while it is trained",
        caption="Each client is served by the model that suits its device and its data.",
        figure=figure,
    )


STAGE = Stage(
    name="fedtrans",
    title="FedTrans",
    problem=(
        "Devices of one federated job differ by more than ten times in speed, so one model is too"
        " large for some and too small for others. A family of models grows from the smallest one."
    ),
    command="raysys federate --set recipe.model.hidden=[4] --set family.spread=32",
    run=run,
)
