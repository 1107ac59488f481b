"""Auxo against its rivals, against the oracle, and against its own published rules."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

from jobs.bench.auxo.runs import INNER, LOCAL, METHODS, Row, Run, measured, run_method
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.auxo.config import AuxoConfig, RuleConfig
from raysys.federated.auxo.planted import PlantedConfig

MORE_GROUPS = AuxoConfig(k_max=8)
PRINTED: dict[str, dict[str, Any]] = {
    "raw sketches": {"features": "raw"},
    "K = 2 always": {"k_choice": "two"},
    "literal criterion": {"gate": "literal"},
    "own update in its centroid": {"own_centroid": True},
    "mean + std": {"scale": "mean_std"},
    "every reward lent": {"propagation": "printed"},
    "no probation": {"probation": False},
    "no loss evidence": {"loss_evidence": False},
    "random cohorts for newcomers": {"anchors": False},
}


def sizes(profile: Profile) -> tuple[int, int, range]:
    """Clients, rounds and seeds of a profile."""
    return profile.pick(1000, 2000), profile.pick(100, 200), range(profile.pick(1, 3))


def main_cases(clients: int) -> list[PlantedConfig]:
    """The three columns that the method is held to."""
    return [
        PlantedConfig(kind=kind, alpha=alpha, clients=clients)
        for kind, alpha in (("labels", 100.0), ("labels", 5.0), ("rotation", 100.0))
    ]


def more_cases(clients: int) -> list[PlantedConfig]:
    """Other numbers and sizes of groups, and stronger label skew."""
    return [
        PlantedConfig(kind="rotation", alpha=5.0, clients=clients),
        PlantedConfig(kind="inversion", groups=2, clients=clients),
        PlantedConfig(kind="labels", groups=2, clients=clients),
        PlantedConfig(kind="labels", groups=8, clients=clients),
        PlantedConfig(kind="labels", groups=3, shares=(0.7, 0.2, 0.1), clients=clients),
    ]


def ari_seen(profile: Profile) -> Claim:
    """Lowest mean adjusted Rand index over the seen clients, by population; gap to the oracle."""
    clients, rounds, seeds = sizes(profile)
    cases = [*main_cases(clients), *(more_cases(clients) if profile.full else [])]
    table = {}
    for case in cases:
        config = MORE_GROUPS if case.groups > 6 else None
        ours, oracle = (
            measured(
                profile,
                [Run(method=m, case=case, seed=s, rounds=rounds, config=c) for s in seeds],
            )
            for m, c in (("auxo", config), ("oracle", None))
        )
        gap = [100 * (o["mean"] - a["mean"]) for a, o in zip(ours, oracle)]
        table[title(case)] = {
            "ari": [row["ari"] for row in ours],
            "accuracy": [row["mean"] for row in ours],
            "oracle": [row["mean"] for row in oracle],
            "points_below_oracle": [round(value, 2) for value in gap],
            "cohorts": [row["cohorts"] for row in ours],
            "split_at": [row["splits"] for row in ours],
            "wasted": [row["wasted"] for row in ours],
        }
    means = {name: statistics.mean(row["ari"]) for name, row in table.items()}
    return Claim(
        name="ari_seen",
        value=min(means.values()),
        unit="adjusted Rand index, worst population's mean over seeds",
        better="higher",
        samples={
            "populations": table,
            "worst_points_below_oracle": max(
                statistics.mean(row["points_below_oracle"]) for row in table.values()
            ),
        },
        seeds=list(seeds),
    )


def one_group_stays_one(profile: Profile) -> Claim:
    """Most cohorts on skewed populations without groups, or too skewed to tell; 1 is right."""
    clients, rounds, seeds = sizes(profile)
    cases = {
        f"one group, Dirichlet {alpha:g}": PlantedConfig(groups=1, alpha=alpha, clients=clients)
        for alpha in profile.pick((0.1,), (0.1, 0.5, 5.0))
    }
    found = {
        name: [row["cohorts"] for row in measured(profile, [
            Run(method="auxo", case=case, seed=seed, rounds=rounds) for seed in seeds
        ])]
        for name, case in cases.items()
    }  # fmt: skip
    return Claim(
        name="one_group_stays_one",
        value=max(max(row) for row in found.values()),
        unit="cohorts",
        better="lower",
        baseline=Baseline(name="right answer", value=1),
        samples=found,
        seeds=list(seeds),
    )


def extra_device_work(profile: Profile) -> Claim:
    """Device work and downloads over FedAvg's in as many device-rounds, as the engine counts them.

    An evaluation is a third of a training pass; the engine knows nothing of those that IFCA's
    devices do before they train, so that these are added.
    """
    clients, rounds, _ = sizes(profile)
    case = main_cases(clients)[1]
    runs = [
        Run(method=m, case=case, seed=0, rounds=rounds // 2) for m in ("auxo", "fedavg", "ifca")
    ]
    pieces = [
        Piece(f"work-{run.name}", dataclasses.asdict(run), functools.partial(_work, run))
        for run in runs
    ]
    ours, one, ifca = measure_pieces(profile.partial, pieces)
    extra = [row["passes"] / one["passes"] - 1 for row in (ours, ifca)]
    return Claim(
        name="extra_device_work",
        value=extra[0],
        unit="share of device work over that of FedAvg",
        better="lower",
        baseline=Baseline(name="IFCA told K", value=extra[1]),
        samples={
            "rows": {"auxo": ours, "fedavg": one, "ifca": ifca},
            "downloads_over_fedavg": ours["downloads"] / one["downloads"],
        },
        seeds=[0],
    )


def _work(run: Run) -> Row:
    """Training passes and downloads per participation, and the splits among which they fell."""
    found = run_method(run)
    passes = found.macs / found.device_rounds
    return {
        "passes": passes * (1 + found.evaluations / (3 * LOCAL.epochs)),
        "downloads": found.bytes_down / found.device_rounds * found.downloads,
        "splits": [e["round"] for e in found.events if e["event"] == "split"],
    }


def vs_rivals(profile: Profile) -> Claim:
    """Mean accuracy over clients beside every rival, at equal device-rounds."""
    clients, rounds, _ = sizes(profile)
    seeds = range(3)  # one seed shows a rival's luck with its random starts, or its bad luck
    cases = main_cases(clients)[1:2] if not profile.full else main_cases(clients)
    table = {
        title(case): {
            method: _summary(
                measured(
                    profile,
                    [Run(method=method, case=case, seed=s, rounds=rounds) for s in seeds],
                )
            )
            for method in METHODS
        }
        for case in cases
    }
    means = {m: statistics.mean(row[m]["mean"] for row in table.values()) for m in METHODS}
    best = max((m for m in METHODS if m not in ("auxo", "oracle")), key=lambda m: means[m])
    return Claim(
        name="vs_rivals",
        value=means["auxo"],
        unit="mean accuracy over clients",
        better="higher",
        baseline=Baseline(name=f"best rival: {best}", value=means[best]),
        ratio=means["auxo"] / means[best],
        samples={"populations": table, "means": means},
        seeds=list(seeds),
    )


def inner_algorithms(profile: Profile) -> Claim:
    """Gain of cohorts over one model, with each server algorithm inside."""
    clients, rounds, _ = sizes(profile)
    case = main_cases(clients)[1]
    table = {}
    for inner in profile.pick(INNER[:2], INNER):
        rows = {
            m: measured(profile, [Run(method=m, case=case, seed=0, rounds=rounds, inner=inner)])[0]
            for m in ("auxo", "fedavg", "oracle")
        }
        table[inner] = {
            "auxo": rows["auxo"]["mean"],
            "one model": rows["fedavg"]["mean"],
            "oracle": rows["oracle"]["mean"],
            "ari": rows["auxo"]["ari"],
        }
    gains = [100 * (row["auxo"] - row["one model"]) for row in table.values()]
    return Claim(
        name="inner_algorithms",
        value=min(gains),
        unit="points of accuracy over one model, smallest over server algorithms",
        better="higher",
        baseline=Baseline(name="one model", value=0.0),
        samples=table,
        seeds=[0],
    )


def ablations(profile: Profile) -> Claim:
    """What each departure from the published rules is worth: one rule put back at a time."""
    clients, rounds, seeds = sizes(profile)
    case = main_cases(clients)[1]
    configs = {"all ours": AuxoConfig()}
    for name, change in PRINTED.items():
        configs[name] = AuxoConfig(rules=dataclasses.replace(RuleConfig(), **change))
    configs["no coverage wait"] = AuxoConfig(cover=0.0)
    if not profile.full:
        configs = {n: configs[n] for n in ("all ours", "raw sketches", "K = 2 always")}
    table = {
        name: _summary(
            measured(
                profile,
                [
                    Run(method="auxo", case=case, seed=s, rounds=rounds, config=config)
                    for s in seeds
                ],
            )
        )
        for name, config in configs.items()
    }
    published = measured(
        profile, [Run(method="published", case=case, seed=s, rounds=rounds) for s in seeds]
    )
    table["all published"] = _summary(published)
    ours = table["all ours"]["mean"]
    return Claim(
        name="ablations",
        value=ours,
        unit="mean accuracy over clients",
        better="higher",
        baseline=Baseline(name="all published rules", value=table["all published"]["mean"]),
        ratio=ours / table["all published"]["mean"],
        samples=table,
        seeds=list(seeds),
    )


def title(case: PlantedConfig) -> str:
    """A population in words."""
    parts = "" if case.shares is None else " " + "/".join(f"{100 * s:.0f}" for s in case.shares)
    return f"{case.kind}, {case.groups} groups{parts}, Dirichlet {case.alpha:g}"


def _summary(rows: Sequence[Row]) -> Row:
    """Means over seeds, and device-rounds to each target (None where a seed missed it)."""
    names = ("mean", "worst", "best", "variance", "ari", "cohorts", "wasted",
             "downloads_per_participation", "extra_evaluations", "cpu_s")  # fmt: skip
    found: Row = {name: round(statistics.mean(row[name] for row in rows), 4) for name in names}
    targets = rows[0]["to_target"]
    found["to_target"] = {
        target: None if any(row["to_target"][target] is None for row in rows)
        else statistics.mean(row["to_target"][target] for row in rows)
        for target in targets
    }  # fmt: skip
    found["seeds"] = [row["mean"] for row in rows]
    return found
