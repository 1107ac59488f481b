"""KGT inside federated averaging against all layers trained and against a linear schedule."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import numpy as np
import torch

from jobs.bench.fedtrans import arena
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile
from raysys.compose.frozen_clients import (
    FreezeConfig,
    FrozenPrefixJob,
    PlasticityWatch,
    linear_schedule,
    sent_by,
)
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.training import Samples

LOCAL = LocalConfig(steps=20, batch_size=10, lr=0.05)
ARMS = ("fedavg", "kgt", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One seed of all arms.

    Args:
        hidden: widths of the MLP. clients, per_round: of the population, and of a round.
        held: training samples that the server alone has. freeze: how it looks and decides.
    """

    seed: int
    rounds: int
    hidden: tuple[int, ...] = (128, 128, 128)
    clients: int = 100
    per_round: int = 10
    held: int = 128
    freeze: FreezeConfig = dataclasses.field(default_factory=FreezeConfig)

    def piece(self) -> Piece:
        """The run, by itself."""
        key = dataclasses.asdict(self)
        return Piece(f"frozen-{self.seed}", key, functools.partial(run_case, self))


def kgt_in_clients(profile: Profile) -> Claim:
    """CPU time of plain federated averaging over that with KGT's freezing, median of seeds."""
    rounds, seeds = profile.pick((60, range(2)), (200, range(3)))
    pieces = [Case(seed=seed, rounds=rounds).piece() for seed in seeds]
    rows = measure_pieces(profile.partial, pieces)
    ratios = [row["fedavg"]["cpu_s"] / row["kgt"]["cpu_s"] for row in rows]
    fields = ("accuracy", "cpu_s", "bytes_up")
    table = {
        arm: {field: statistics.mean(row[arm][field] for row in rows) for field in fields}
        for arm in ARMS
    }
    return Claim(
        name="kgt_in_clients",
        value=statistics.median(ratios),
        unit="times less CPU time of clients",
        better="higher",
        baseline=Baseline(name="FedAvg, all layers trained", value=1.0),
        ratio=statistics.median(ratios),
        samples={"table": table, "rows": rows, "ratios": ratios},
        seeds=list(seeds),
    )


def run_case(case: Case) -> dict[str, Any]:
    """All arms on one population; the last ``held`` training samples are the server's alone."""
    torch.set_num_threads(1)
    name = arena.data_sets()[-1]
    data = arena.load(name, case.seed)
    sizes = (int(np.prod(data.inputs.shape[1:])), *case.hidden, data.classes or 0)
    everything = data.samples()
    samples = Samples(everything.inputs[: -case.held], everything.targets[: -case.held])
    scheme = PartitionConfig(scheme="dirichlet", clients=case.clients, alpha=0.5)
    population = partition(data.targets[: -case.held], scheme, case.seed)
    spec = ModelSpec(architecture=Mlp(sizes=sizes))
    held, schedule = everything.inputs[-case.held :], [0] * case.rounds
    found: dict[str, Any] = {"seed": case.seed, "data": name}
    for arm in ARMS:
        job = FrozenPrefixJob(sizes, LOCAL, case.per_round, population, samples, case.seed)
        watch = PlasticityWatch(sizes, held, case.freeze)
        if arm == "linear":
            schedule = linear_schedule(sizes, case.rounds, sent_by(sizes, schedule))
        sent = 0
        for number in range(case.rounds):
            sent += job.round().bytes_up
            if arm == "kgt":
                schedule[number] = watch.observe(number, job.weights)
            if arm != "fedavg":
                job.freeze(schedule[number])
        guess = outputs(spec, job.weights, torch.from_numpy(data.test_inputs)).argmax(dim=1)
        found[arm] = {
            "accuracy": float(np.mean(guess.numpy() == data.test_targets)),
            "cpu_s": job.client_cpu_s,
            "bytes_up": sent,
            "frozen_at": [schedule.index(n) + 1 for n in sorted(set(schedule)) if n]
            if arm != "fedavg" else [],
        }  # fmt: skip
    return found
