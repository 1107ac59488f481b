"""FedTrans: what growing a family of models gives on unequal devices, and what each part gives."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np

from jobs.bench.fedtrans.arena import (
    CLIENTS,
    LOCAL,
    PARTITIONS,
    PER_ROUND,
    SPREAD,
    Arena,
    Outcome,
    data_sets,
    fedtrans,
    full_sizes,
    growing,
    make_arena,
    play,
    rivals,
)
from jobs.bench.fedtrans.exact import (
    distinct_units,
    mixture_constant,
    never_above_capacity,
    preserves,
    reduces_to_fedavg,
)
from raysys.bench import Baseline, Claim, Profile, paired_claim
from raysys.federated.fedtrans.config import FedTransConfig, GrowthConfig, MixtureConfig

PRINTED = ("heterofl", "splitmix", "fluid")  # the rivals of the paper
CONFIG: dict[str, Any] = {
    "clients": CLIENTS,
    "per_round": PER_ROUND,
    "capacity_spread": SPREAD,
    "local": dataclasses.asdict(LOCAL),
    "growth": dataclasses.asdict(GrowthConfig()),
    "mixture": dataclasses.asdict(MixtureConfig()),
    "accuracy": "mean over clients of the deployed model's, by the client's label mix",
}


def vs_rivals(profile: Profile) -> Claim:
    """Mean client accuracy against every rival, all stopped at FedTrans's multiply-accumulates."""
    rounds, seeds = profile.pick((150, (1,)), (400, (1, 2, 3)))
    tasks = [(name, scheme) for name in data_sets() for scheme in PARTITIONS]
    tasks = profile.pick(tasks[:1], tasks)
    table: dict[str, list[dict[str, Any]]] = {}
    for name, scheme in tasks:
        for seed in seeds:
            arena = make_arena(name, scheme, seed)
            ours = fedtrans(arena, FedTransConfig(growth=growing(rounds)))
            outcome = play(arena, ours, rounds)
            where = {"data": name, "split": scheme, "seed": seed}
            models = [model.net.macs() for model in ours.family()]
            table.setdefault("fedtrans", []).append({**where, **_row(outcome), "models": models})
            for rival, make in rivals(arena, full_sizes(ours)).items():
                entry = _row(play(arena, make(), 20 * rounds, budget=outcome.macs))
                table.setdefault(rival, []).append({**where, **entry})
    means = {
        name: statistics.fmean(row["accuracy"] for row in rows) for name, rows in table.items()
    }
    best = max(PRINTED, key=lambda name: means[name])
    margins = {name: 100 * (means["fedtrans"] - mean) for name, mean in means.items()}
    return Claim(
        name="vs_rivals",
        value=100 * means["fedtrans"],
        unit="% mean client accuracy",
        better="higher",
        baseline=Baseline(name=best, value=100 * means[best]),
        ratio=means["fedtrans"] / means[best],
        samples={
            "points_above": margins,
            "macs_to_accuracy": {name: _macs_ratio(table, name) for name in PRINTED},
            "runs": table,
        },
        seeds=seeds,
    )


def ablations(profile: Profile) -> Claim:
    """Mean client accuracy with each part switched to its printed form or off."""
    rounds, seeds = profile.pick((150, (1,)), (400, (1, 2, 3)))
    grown = growing(rounds)
    variants = {
        "full": FedTransConfig(growth=grown),
        "equal split": FedTransConfig(growth=growing(rounds, split="equal")),
        "noise instead of shares": FedTransConfig(growth=growing(rounds, split="noise")),
        "random cells": FedTransConfig(growth=growing(rounds, select="random")),
        "no warm start": FedTransConfig(growth=growing(rounds, warm_start=False)),
        "nothing lent": FedTransConfig(growth=grown, mixture=MixtureConfig(what="nothing")),
        "weights lent": FedTransConfig(growth=grown, mixture=MixtureConfig(what="weights")),
        "weights lent, cropped": FedTransConfig(
            growth=grown, mixture=MixtureConfig(what="weights", projection="crop")
        ),
        "mixture as printed": FedTransConfig(
            growth=grown,
            mixture=MixtureConfig(
                what="weights", projection="crop", normalise=False, clock="round"
            ),
        ),
        "no decay": FedTransConfig(growth=grown, mixture=MixtureConfig(eta=1.0)),
        "one small model": FedTransConfig(growth=GrowthConfig(enabled=False)),
    }
    if not profile.full:
        variants = {name: variants[name] for name in ("full", "equal split", "one small model")}
    name = data_sets()[0]
    arenas = [make_arena(name, "dirichlet", seed) for seed in seeds]
    found = {label: [_final(arena, config, rounds) for arena in arenas]
             for label, config in variants.items()}  # fmt: skip
    return paired_claim(
        "ablations",
        "share of right answers",
        "higher",
        ours=[entry["accuracy"] for entry in found["full"]],
        baseline_name="equal split",
        baseline=[entry["accuracy"] for entry in found["equal split"]],
        seeds=seeds,
        extra={"variants": found, "data": name},
    )


def _final(arena: Arena, config: FedTransConfig, rounds: int) -> dict[str, Any]:
    strategy = fedtrans(arena, config)
    entry = _row(play(arena, strategy, rounds, points=1))
    return {**entry, "models": [model.net.macs() for model in strategy.family()]}


def _row(outcome: Outcome) -> dict[str, Any]:
    return dataclasses.asdict(outcome)


def _macs_ratio(table: dict[str, list[dict[str, Any]]], rival: str) -> float | None:
    """Rival's over our multiply-accumulates to the rival's final accuracy, median over runs."""
    ratios = []
    for ours, theirs in zip(table["fedtrans"], table[rival]):
        reached = [macs for macs, accuracy in ours["curve"] if accuracy >= theirs["accuracy"]]
        if reached:
            ratios.append(theirs["macs"] / reached[0])
    return float(np.median(ratios)) if ratios else None


CLAIMS = {
    "preserves": preserves,
    "distinct_units": distinct_units,
    "mixture_constant": mixture_constant,
    "never_above_capacity": never_above_capacity,
    "reduces_to_fedavg": reduces_to_fedavg,
    "vs_rivals": vs_rivals,
    "ablations": ablations,
}
