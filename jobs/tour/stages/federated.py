"""The federated core: FedAvg over 100 unlike clients against training on all data in one place."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from actors.federated.driver import FederatedRun
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import Score, evaluate
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import ModelSpec, flatten, initial_weights, load_flat
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.randomness import Purpose, torch_seed
from raysys.federated.core.recipe import FederatedConfig, load_data, make_population
from raysys.report import Plot, new_figure

CLIENTS = 100
PER_ROUND = 20
CENTRAL_EPOCHS = 60


def run(context: StageContext) -> StageResult:
    """Train the digits both ways and time the clients."""
    rounds = 40 if context.smoke else 400
    recipe = FederatedConfig(
        seed=context.seed,
        clients_per_round=PER_ROUND,
        partition=PartitionConfig(scheme="shards", clients=CLIENTS, classes_per_client=2),
        local=LocalConfig(epochs=1, batch_size=10, lr=0.1),
    )
    data = load_data(recipe.data, recipe.seed, None)
    spec = recipe.model.spec(data)
    federated = FederatedRun(
        recipe,
        data,
        make_population(recipe, data),
        spec,
        workers=2,
        worker_cpus=0,
        evaluate_every=max(1, rounds // 20),
    )
    try:
        points: list[tuple[int, float]] = []
        spreads: list[tuple[int, dict[str, float]]] = []
        busy_s = wall_s = 0.0
        updates = 0
        for summary in federated.rounds(rounds):
            context.progress(summary.round_id + 1, rounds, "federated rounds")
            if summary.score is not None:
                points.append((summary.round_id + 1, summary.score.accuracy))
                spreads.append((summary.round_id + 1, summary.spread or {}))
            if summary.round_id:  # the first waits for the workers to start
                busy_s += summary.busy_s
                wall_s += summary.duration_s
                updates += summary.counts["ok"]
    finally:
        federated.close()
    central = _central(data, spec, context.seed, 10 if context.smoke else CENTRAL_EPOCHS)
    loop_rate = _plain_loop_rate(data, spec, recipe.local, context.seed)
    rows = [
        Row(
            measure="test accuracy, 2 classes per client",
            unit="share",
            better="higher",
            baseline_name="central training (upper reference)",
            baseline=central.accuracy,
            ours=points[-1][1],
        ),
        Row(
            measure="clients trained per CPU second of a worker",
            unit="1/s",
            better="higher",
            baseline_name="plain loop, torch.optim.SGD",
            baseline=loop_rate,
            ours=updates / max(busy_s, 1e-9),
        ),
    ]
    return StageResult(
        rows=rows,
        headline=1,
        plots=[_curve(points, spreads, central.accuracy)],
        notes=[
            f"{CLIENTS} clients of about {len(data.targets) // CLIENTS} digits, two classes each; "
            f"{PER_ROUND} per round, {rounds} rounds, two workers.",
            f"{updates / max(wall_s, 1e-9):.0f} clients/s of wall time with {PER_ROUND} per round.",
        ],
    )


def _central(data: FederatedData, spec: ModelSpec, seed: int, epochs: int) -> Score:
    """Minibatch SGD on all training samples, the same model and start."""
    module = load_flat(spec.architecture.build(), initial_weights(spec, seed).values)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    samples = data.samples()
    order = torch.Generator().manual_seed(torch_seed(seed, Purpose.BATCHES))
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(samples.targets), generator=order), 10):
            _step(module, optimiser, samples.inputs[batch], samples.targets[batch])
    return evaluate(spec, flatten(module), data.test_samples())


def _plain_loop_rate(data: FederatedData, spec: ModelSpec, local: LocalConfig, seed: int) -> float:
    """Clients per CPU second of a loop over clients with one re-used module."""
    module = load_flat(spec.architecture.build(), initial_weights(spec, seed).values)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    samples = data.samples()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clients, per_client = 60, len(data.targets) // CLIENTS
    begin = time.process_time()
    for client in range(clients):
        module.load_state_dict(start)
        optimiser = torch.optim.SGD(module.parameters(), lr=local.lr)
        first = client * per_client % (len(samples.targets) - per_client)
        for batch in torch.split(torch.randperm(per_client) + first, local.batch_size):
            _step(module, optimiser, samples.inputs[batch], samples.targets[batch])
    elapsed = time.process_time() - begin
    torch.set_num_threads(threads)
    return clients / elapsed


def _step(module: nn.Module, optimiser: torch.optim.SGD, x: torch.Tensor, y: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss = nn.functional.cross_entropy(module(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def _curve(
    points: list[tuple[int, float]], spreads: list[tuple[int, dict[str, float]]], central: float
) -> Plot:
    figure, axes = new_figure()
    rounds: list[Any] = [r for r, _ in points]
    low = [spread["p10"] for _, spread in spreads]
    high = [spread["p90"] for _, spread in spreads]
    axes.fill_between(rounds, low, high, alpha=0.2, label="clients, 10th to 90th percentile")
    axes.plot(rounds, [accuracy for _, accuracy in points], label="FedAvg, test set")
    axes.axhline(central, linestyle="--", color="#8a8f98", label="central training")
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy")
    axes.legend()
    return Plot(
        title="Accuracy by round on digits split non-IID",
        caption="The band is the spread over clients, each on its own samples.",
        figure=figure,
    )


STAGE = Stage(
    name="federated",
    title="Federated core",
    problem=(
        "Federated training is simulated client by client, with a process, message or model object "
        "each. We train many clients in one tensor program, and a worker per core."
    ),
    command="raysys federate --set rounds=400 --set recipe.partition.scheme=shards",
    run=run,
)
