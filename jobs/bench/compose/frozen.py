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

HIDDEN = (128, 128, 128)
LOCAL = LocalConfig(steps=20, batch_size=10, lr=0.05)
CLIENTS, PER_ROUND, HELD = 100, 10, 128
ARMS = ("fedavg", "kgt", "linear")


def kgt_in_clients(profile: Profile) -> Claim:
    """CPU time of plain federated averaging over that with KGT's freezing, median of seeds."""
    rounds, seeds = profile.pick((60, range(2)), (200, range(3)))
    pieces = [
        Piece(
            f"frozen-{seed}",
            {"seed": seed, "rounds": rounds, "freeze": dataclasses.asdict(FreezeConfig())},
            functools.partial(run_seed, seed, rounds),
        )
        for seed in seeds
    ]
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


def run_seed(seed: int, rounds: int) -> dict[str, Any]:
    """All arms on one population; the last ``HELD`` training samples are the server's alone."""
    torch.set_num_threads(1)
    data = arena.load(arena.data_sets()[-1], seed)
    sizes = (int(np.prod(data.inputs.shape[1:])), *HIDDEN, data.classes or 0)
    everything = data.samples()
    samples = Samples(everything.inputs[:-HELD], everything.targets[:-HELD])
    scheme = PartitionConfig(scheme="dirichlet", clients=CLIENTS, alpha=0.5)
    population = partition(data.targets[:-HELD], scheme, seed)
    spec = ModelSpec(architecture=Mlp(sizes=sizes))
    held, found, schedule = everything.inputs[-HELD:], {}, [0] * rounds
    for arm in ARMS:
        job = FrozenPrefixJob(sizes, LOCAL, PER_ROUND, population, samples, seed)
        watch = PlasticityWatch(sizes, held, FreezeConfig())
        if arm == "linear":
            schedule = linear_schedule(sizes, rounds, sent_by(sizes, schedule))
        sent = 0
        for number in range(rounds):
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
