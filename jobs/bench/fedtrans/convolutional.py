"""A family of convolutional networks, against one small and one large network for all."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jobs.bench.fedtrans.arena import (
    LOCAL,
    PER_ROUND,
    Arena,
    data_sets,
    fedtrans,
    growing,
    make_arena,
    play,
)
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Claim, Profile, paired_claim
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.strategy import RoundReport, Strategy
from raysys.federated.fedtrans.cells import Conv
from raysys.federated.fedtrans.config import FedTransConfig
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.strategy import FedTrans

FIRST = (Conv(channels=2, pool=True), Conv(channels=4, pool=True))


def conv_family(profile: Profile) -> Claim:
    """Mean client accuracy of a convolutional family and of its first model, at equal work."""
    rounds, seeds = profile.pick((40, (1,)), (200, (1,)))
    soon = profile.pick({"delta": 6, "gamma": 4, "beta": 0.02}, {})
    # Twice the channels of one layer are twice the work of two layers.
    config = FedTransConfig(growth=growing(rounds, widen=2.0, **soon))
    pieces = []
    for name in profile.pick(data_sets()[:1], data_sets()):
        for seed in seeds:
            key = {"data": name, "seed": seed, "rounds": rounds,
                   "config": dataclasses.asdict(config)}  # fmt: skip
            measure = functools.partial(_contest, name, seed, config, rounds)
            pieces.append(Piece(f"conv-{name}-{seed}", key, measure))
    rows = measure_pieces(profile.partial, pieces)
    return paired_claim(
        "conv_family",
        "share of right answers",
        "higher",
        ours=[row["fedtrans"]["accuracy"] for row in rows],
        baseline_name="first model for all",
        baseline=[row["first model"]["accuracy"] for row in rows],
        seeds=seeds,
        extra={"runs": rows},
    )


def _contest(name: str, seed: int, config: FedTransConfig, rounds: int) -> dict[str, Any]:
    arena = make_arena(name, "dirichlet", seed, FIRST)
    ours = fedtrans(arena, config)
    outcome = play(arena, ours, rounds, work=functools.partial(_work, arena, ours))
    largest = max((model.net for model in ours.family()), key=lambda net: net.macs())
    rows = {"fedtrans": {**dataclasses.asdict(outcome), "models": ours.macs()}}
    for label, net in {"first model": arena.net, "largest model, no caps": largest}.items():
        alone = FedAvg(net.spec(), LOCAL, PER_ROUND)
        work = functools.partial(_work, arena, net)
        played = play(arena, alone, 20 * rounds, budget=outcome.macs, work=work)
        rows[label] = dataclasses.asdict(played)
    return {"data": name, "seed": seed, **rows}


def _work(arena: Arena, trained: Strategy | CellNet, report: RoundReport) -> float:
    """Multiply-accumulates of a round by the networks' own count, forward and twice that back."""
    clients = report.table.clients[report.table.ok]
    counts = arena.population.counts(clients)
    samples = LOCAL.steps_of(counts) * np.minimum(LOCAL.batch_size, counts)
    if isinstance(trained, FedTrans):
        cost = np.array(trained.macs())[trained.placed(clients)]
    else:
        assert isinstance(trained, CellNet)
        cost = np.full(len(clients), trained.macs())
    return 3.0 * float((cost * samples).sum())
