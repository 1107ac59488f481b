"""Serve a federated job to devices that Venn grants: plans and models out, updates in."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from typing import Any

from actors.edge.job import EdgeJobConfig
from actors.edge.server import EdgeServerConfig
from actors.edge.service import EdgeService, VennConfig
from actors.metrics import MetricsRecorder
from jobs.launcher import Job, JobContext, Summary
from raysys import machine
from raysys.config import check, check_range
from raysys.federated.core.evaluation import Score, evaluate
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import FederatedConfig, load_data, make_line
from raysys.federated.core.serialize import pack_arrays
from raysys.federated.core.strategy import RoundReport

MODEL_FILE = "model.arrow"


def _recipe() -> FederatedConfig:
    return FederatedConfig(clients_per_round=10, partition=PartitionConfig(clients=20))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A job and its service.

    Args:
        listen: where devices reach the edge plane; port 0 takes a free one.
        recipe: model, local training and server optimiser; its data is used for the test set
            only, and ``partition.clients`` is the number of places for devices.
        rounds: number of rounds. job: name, deadline and so on; ``clients_per_round`` is the
            recipe's.
    """

    listen: str = "127.0.0.1:7710"
    rounds: int = 30
    recipe: FederatedConfig = dataclasses.field(default_factory=_recipe)
    job: EdgeJobConfig = dataclasses.field(default_factory=EdgeJobConfig)
    server: EdgeServerConfig = dataclasses.field(default_factory=EdgeServerConfig)
    venn: VennConfig = dataclasses.field(default_factory=VennConfig)

    def __post_init__(self) -> None:
        check(self, "listen", ":" in self.listen, "host:port")
        check_range(self, "rounds", 1)

    @property
    def seed(self) -> int:
        """The recipe's seed, for the manifest."""
        return self.recipe.seed


def run(config: ServeConfig, context: JobContext) -> Summary:
    """Serve until the rounds are done; the run directory gets the model."""
    return asyncio.run(serve(config, context))


async def serve(config: ServeConfig, context: JobContext) -> Summary:
    """The service and its one job."""
    recipe = config.recipe
    data = load_data(recipe.data, recipe.seed, machine.data_dir())
    spec = recipe.model.spec(data)
    strategy = make_line(recipe, spec)
    job_config = dataclasses.replace(
        config.job, clients_per_round=recipe.clients_per_round, screen=recipe.screen
    )
    clients = recipe.partition.clients
    service = EdgeService(config.venn, config.server, clients, time.time())
    scores: list[Score] = []

    def note(round_id: int, report: RoundReport) -> None:
        score = evaluate(spec, strategy.weights(0), data.test_samples())
        scores.append(score)
        _record(context.metrics, round_id, report, score, service)
        context.run.append_rows("rounds", [_row(round_id, report, score)])
        context.console.print(f"round {round_id}: accuracy {score.accuracy:.4f}", markup=False)

    try:
        address = await service.start(config.listen)
        host = address.rpartition(":")[0]
        job = service.add(job_config, strategy, recipe.seed, host)
        print(f"edge plane {address}", flush=True)
        await job.run(config.rounds, note)
    finally:
        await service.close()
    context.run.storage.write(MODEL_FILE, pack_arrays({"weights": strategy.weights(0)}))
    result = {"rounds": len(scores), "accuracy": scores[-1].accuracy, "repeats": job.repeats}
    context.run.write_json("result.json", result)
    line = f"{len(scores)} rounds, accuracy {scores[-1].accuracy:.4f}, {job.repeats} repeats"
    return Summary(lines=[line])


def _record(
    metrics: MetricsRecorder, round_id: int, report: RoundReport, score: Score, service: EdgeService
) -> None:
    """A round for Prometheus; totals since the start where a name ends in ``_total``."""
    values = {"test_accuracy": score.accuracy, "test_loss": score.loss}
    values |= {"round": float(round_id), "round_s": report.duration_s}
    if (server := service.server) is not None:
        values["devices"] = len(server.registry.devices)
        values["refused_leases_total"] = server.refused_leases
        values["bytes_down_total"], values["bytes_up_total"] = server.bytes_down, server.bytes_up
    for name, value in values.items():
        if math.isfinite(value):
            metrics.record(f"edge_{name}", value, step=round_id)
    for outcome, count in report.counts.items():
        metrics.record("edge_updates", count, step=round_id, tags={"outcome": outcome})


def _row(round_id: int, report: RoundReport, score: Score) -> dict[str, Any]:
    return {
        "round": round_id,
        "accuracy": score.accuracy,
        "loss": score.loss,
        "updates": report.counts["ok"],
        "duration_s": report.duration_s,
    }


JOB = Job(name="device serve", config=ServeConfig, run=run, flags=("listen",))
