"""FedTrans against its rivals at equal work, and with each of its parts switched off."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import numpy as np

from jobs.bench.fedtrans.arena import (
    PARTITIONS,
    Arena,
    data_sets,
    fedtrans,
    full_sizes,
    growing,
    make_arena,
    play,
    rivals,
)
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile, paired_claim
from raysys.federated.fedtrans.config import (
    AssignmentConfig,
    FedTransConfig,
    GrowthConfig,
    MixtureConfig,
)

RIVALS = (
    "fedavg small", "heterofl", "splitmix", "fluid", "fedrolex", "fedavg middle",
    "fedavg unlimited",
)  # fmt: skip
PRINTED = ("heterofl", "splitmix", "fluid")  # the rivals of the paper
EVERYBODY = 10**6  # no model has so many participants: losses are compared over all models
UNBOUNDED = 1e6


def vs_rivals(profile: Profile) -> Claim:
    """Mean client accuracy against every rival, all stopped at FedTrans's multiply-accumulates."""
    rounds, seeds = profile.pick((150, (1,)), (400, (1, 2, 3)))
    tasks = [(name, scheme) for name in data_sets() for scheme in PARTITIONS]
    tasks = profile.pick(tasks[:1], tasks)
    places = [
        {"data": name, "split": scheme, "seed": seed} for name, scheme in tasks for seed in seeds
    ]
    config = FedTransConfig(growth=growing(rounds))
    table = _table(profile.partial, places, config, rounds)
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
    variants = _variants(rounds)
    if not profile.full:
        variants = {name: variants[name] for name in ("full", "equal split", "one small model")}
    name = data_sets()[0]
    pieces = []
    for label, config in variants.items():
        for seed in seeds:
            key = {"data": name, "seed": seed, "rounds": rounds,
                   "config": dataclasses.asdict(config)}  # fmt: skip
            measure = functools.partial(_alone, name, seed, config, rounds)
            pieces.append(Piece(f"ablation-{label.replace(' ', '-')}-{seed}", key, measure))
    rows = iter(measure_pieces(profile.partial, pieces))
    found = {label: [next(rows) for _ in seeds] for label in variants}
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


def _variants(rounds: int) -> dict[str, FedTransConfig]:
    grown = growing(rounds)
    printed_mixture = MixtureConfig(
        what="weights", projection="crop", normalise=False, clock="round", eta=0.98
    )
    return {
        "full": FedTransConfig(growth=grown),
        "uneven copies": FedTransConfig(growth=growing(rounds, split="uneven")),
        "equal split": FedTransConfig(growth=growing(rounds, split="equal")),
        "noise instead of shares": FedTransConfig(growth=growing(rounds, split="noise")),
        "random cells": FedTransConfig(growth=growing(rounds, select="random")),
        "no warm start": FedTransConfig(growth=growing(rounds, warm_start=False)),
        "nothing lent": FedTransConfig(growth=grown, mixture=MixtureConfig(what="nothing")),
        "lent downwards only": FedTransConfig(growth=grown, mixture=MixtureConfig(lend="down")),
        "weights lent": FedTransConfig(
            growth=grown, mixture=MixtureConfig(what="weights", eta=0.98)
        ),
        "weights lent, cropped": FedTransConfig(
            growth=grown, mixture=MixtureConfig(what="weights", projection="crop", eta=0.98)
        ),
        "mixture as printed": FedTransConfig(growth=grown, mixture=printed_mixture),
        "lending decays by 0.9": FedTransConfig(growth=grown, mixture=MixtureConfig(eta=0.9)),
        "losses compared over all models": FedTransConfig(
            growth=grown, assignment=AssignmentConfig(peers=EVERYBODY)
        ),
        "no head start": FedTransConfig(growth=grown, assignment=AssignmentConfig(head_start=0.0)),
        "all as printed": FedTransConfig(
            growth=growing(rounds, split="equal"),
            mixture=printed_mixture,
            assignment=AssignmentConfig(peers=EVERYBODY, head_start=0.0, bound=UNBOUNDED),
        ),
        "one small model": FedTransConfig(growth=GrowthConfig(enabled=False)),
    }


def _table(
    folder: str, places: list[dict[str, Any]], config: FedTransConfig, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows of FedTrans and of every rival, one a population; a piece is one run."""
    known = {"rounds": rounds, "config": dataclasses.asdict(config)}
    ours = measure_pieces(
        folder,
        [
            Piece(f"fedtrans-{_label(place)}", {**place, **known},
                  functools.partial(_family, place, config, rounds))
            for place in places
        ],
    )  # fmt: skip
    pieces = []
    for place, row in zip(places, ours):
        for rival in RIVALS:
            key = {**place, "rival": rival, "macs": row["macs"], "sizes": row["sizes"]}
            measure = functools.partial(
                _rival, place, rival, row["macs"], tuple(row["sizes"]), rounds
            )
            pieces.append(Piece(f"{rival}-{_label(place)}".replace(" ", "-"), key, measure))
    found = iter(measure_pieces(folder, pieces))
    table: dict[str, list[dict[str, Any]]] = {"fedtrans": ours}
    for _ in places:
        for rival in RIVALS:
            table.setdefault(rival, []).append(next(found))
    return table


def _label(place: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "-") for value in place.values())


def _arena(place: dict[str, Any]) -> Arena:
    return make_arena(place["data"], place["split"], place["seed"])


def _family(place: dict[str, Any], config: FedTransConfig, rounds: int) -> dict[str, Any]:
    arena = _arena(place)
    ours = fedtrans(arena, config)
    outcome = dataclasses.asdict(play(arena, ours, rounds))
    return {**place, **outcome, "models": ours.macs(), "sizes": full_sizes(ours)}


def _rival(
    place: dict[str, Any], rival: str, macs: float, sizes: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """One rival with FedTrans's largest model as its full one, stopped at FedTrans's work."""
    arena = _arena(place)
    played = play(arena, rivals(arena, sizes)[rival](), 20 * rounds, budget=macs)
    return {**place, **dataclasses.asdict(played)}


def _alone(name: str, seed: int, config: FedTransConfig, rounds: int) -> dict[str, Any]:
    place = {"data": name, "split": "dirichlet", "seed": seed}
    arena = _arena(place)
    strategy = fedtrans(arena, config)
    outcome = dataclasses.asdict(play(arena, strategy, rounds, points=1))
    return {**outcome, "models": strategy.macs()}


def _macs_ratio(table: dict[str, list[dict[str, Any]]], rival: str) -> float | None:
    """Rival's over our multiply-accumulates to the rival's final accuracy, median over runs."""
    ratios = []
    for ours, theirs in zip(table["fedtrans"], table[rival]):
        reached = [macs for macs, accuracy in ours["curve"] if accuracy >= theirs["accuracy"]]
        if reached:
            ratios.append(theirs["macs"] / reached[0])
    return float(np.median(ratios)) if ratios else None
