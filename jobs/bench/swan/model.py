"""Claims that come from the SoC model alone, and are named so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from raysys.bench import Baseline, Claim, Profile
from raysys.federated.swan.choices import Choice, enumerate_choices, greedy_choice
from raysys.federated.swan.exploration import ExplorationConfig
from raysys.federated.swan.frontier import Estimate, prune
from raysys.federated.swan.pilot import Policy
from raysys.federated.swan.simulation import (
    SimulatedPhone,
    Surroundings,
    explore,
    model_estimates,
)
from raysys.federated.swan.soc import (
    BETAS,
    PHONES,
    RESNET34,
    SHUFFLENETV2,
    WORKLOADS,
    Phone,
    Workload,
    step_energy,
    step_time,
)

TASK_STEPS = 200
# SoC, network, beta; greedy step, best choice, best step, time gain, energy gain: the table of the
# model's specification, which was not made with this code.
TABLE = (
    ("Snapdragon 855", "ResNet-34", 0.0, 0.37, "3 big + 1 prime", 0.37, 1.00, 1.00),
    ("Snapdragon 855", "ResNet-34", 4.0, 0.37, "3 big + 1 prime", 0.37, 1.00, 1.00),
    ("Snapdragon 855", "MobileNetV2", 0.0, 0.39, "3 big + 1 prime", 0.39, 1.00, 1.00),
    ("Snapdragon 855", "MobileNetV2", 1.0, 2.34, "1 prime", 1.00, 2.34, 5.07),
    ("Snapdragon 855", "MobileNetV2", 4.0, 7.10, "1 prime", 1.00, 7.10, 15.37),
    ("Snapdragon 855", "ShuffleNetV2", 1.0, 3.00, "1 prime", 1.00, 3.00, 6.49),
    ("Snapdragon 855", "ShuffleNetV2", 4.0, 9.34, "1 prime", 1.00, 9.34, 20.22),
    ("Snapdragon 865", "ShuffleNetV2", 4.0, 9.34, "1 prime", 1.00, 9.34, 20.16),
    ("Snapdragon 845", "MobileNetV2", 1.0, 2.01, "1 big", 1.00, 2.01, 5.33),
    ("Snapdragon 845", "ShuffleNetV2", 4.0, 7.97, "1 big", 1.00, 7.97, 21.11),
)
FRONTIERS = {
    (RESNET34.name, 0.0): (
        "3 big + 1 prime, 2 big + 1 prime, 3 big, 2 big, 4 little, 3 little, 2 little, 1 little"
    ),
    (SHUFFLENETV2.name, 4.0): "1 prime, 1 big, 1 little",
}


def best_of(phone: Phone, workload: Workload, beta: float) -> Estimate:
    """The fastest choice; of equally fast ones the cheapest."""
    return prune(model_estimates(phone, workload, beta))[0]


def model_check_values(profile: Profile) -> Claim:
    """Cells of the published check table that differ in the second decimal; frontiers too."""
    phones = {phone.soc: phone for phone in PHONES}
    workloads = {workload.name: workload for workload in WORKLOADS}
    wrong, cells = [], 0
    for soc, network, beta, *wanted in TABLE:
        phone, workload = phones[soc], workloads[network]
        topology = phone.topology()
        best = best_of(phone, workload, beta)
        greedy = greedy_choice(topology)
        slow = step_time(phone, workload, greedy, beta)
        gain = step_energy(phone, workload, greedy, beta) / best.joules
        found: list[Any] = [
            round(slow, 2),
            best.choice.label(topology),
            round(best.seconds, 2),
            round(slow / best.seconds, 2),
            round(gain, 2),
        ]
        cells += len(found)
        for place, (ours, table) in enumerate(zip(found, wanted)):
            if ours != table:
                wrong.append([soc, network, beta, place, ours, table])
    for (network, beta), expected in FRONTIERS.items():
        kept = prune(model_estimates(PHONES[0], workloads[network], beta), keep_ties=True)
        listed = ", ".join(item.choice.label(PHONES[0].topology()) for item in kept)
        cells += 1
        if listed != expected:
            wrong.append([network, beta, listed, expected])
    return Claim(
        name="model_check_values",
        value=float(len(wrong)),
        unit="cells off",
        better="lower",
        baseline=Baseline(name="specification", value=0.0),
        samples={"cells": cells, "wrong": wrong},
    )


def explored(
    phone: Phone, workload: Workload, beta: float, seed: int, shared: bool = False
) -> tuple[float, float, Choice]:
    """One exploration on a cool phone: gap to the oracle, and cost as a share of 200 best steps.

    With ``shared``, a profile of other phones of the kind is only verified. The gap compares
    noise-free times of the choice that was settled on and of the best one; the cost is the
    noise-free excess of every step of the exploration.
    """
    found = explore(phone, workload, beta, seed, shared=shared, most_steps=TASK_STEPS)
    best_s = best_of(phone, workload, beta).seconds / phone.rate
    excess_s = found.excess_s + found.steps * best_s * found.gap
    return found.gap, excess_s / (TASK_STEPS * best_s), found.settled


def oracle_gap(profile: Profile) -> Claim:
    """Share of time lost on the choice that exploration settled on, against the oracle's."""
    rows = _explorations(profile)
    gaps = [row["gap"] for row in rows]
    return Claim(
        name="oracle_gap",
        value=max(gaps),
        unit="share, worst of all cells (SoC model)",
        better="lower",
        samples={"mean": statistics.fmean(gaps), "cells": len(rows), "rows": rows},
        seeds=list(range(profile.pick(3, 20))),
    )


def exploration_share(profile: Profile) -> Claim:
    """What exploration costs a task of 200 steps, against the baseline of measuring everything."""
    rows = _explorations(profile)
    shares = [row["share"] for row in rows]
    everything = [_full_cost(*cell) for cell in _cells()]
    return Claim(
        name="exploration_share",
        value=max(shares),
        unit="share of 200 best steps, worst cell (SoC model)",
        better="lower",
        baseline=Baseline(name="every choice to the end, all-fast first", value=max(everything)),
        ratio=max(shares) / max(everything),
        samples={"mean": statistics.fmean(shares), "mean_full": statistics.fmean(everything)},
        seeds=list(range(profile.pick(3, 20))),
    )


def _cells() -> list[tuple[Phone, Workload, float]]:
    return [(phone, workload, beta) for phone in PHONES for workload in WORKLOADS for beta in BETAS]


def _explorations(profile: Profile) -> list[dict[str, Any]]:
    rows = []
    for phone, workload, beta in _cells():
        for seed in range(profile.pick(3, 20)):
            gap, share, settled = explored(phone, workload, beta, seed)
            label = settled.label(phone.topology())
            rows.append(
                {
                    "phone": phone.name,
                    "network": workload.name,
                    "beta": beta,
                    "seed": seed,
                    "gap": gap,
                    "share": share,
                    "choice": label,
                }
            )
    return rows


def _full_cost(phone: Phone, workload: Workload, beta: float) -> float:
    """Cost of measuring all choices, two warm-up steps and then five each."""
    config = ExplorationConfig()
    steps = config.first_warmup + config.min_steps
    times = [item.seconds for item in model_estimates(phone, workload, beta)]
    best = min(times)
    return sum(steps * (seconds - best) for seconds in times) / (TASK_STEPS * best)


def phone_speedup(profile: Profile) -> Claim:
    """Time and energy per step of greedy over Swan's settled choice, for all cells."""
    rules: dict[str, Callable[[Phone], list[Choice]]] = {
        "greedy": lambda phone: [greedy_choice(phone.topology())],
        "all cores": _all_cores,
        "one fast core": lambda phone: [_with_counts(phone, fast=1)],
        "little only": lambda phone: [_with_counts(phone, fast=0)],
        "half of the cores": _half,
        "random": lambda phone: enumerate_choices(phone.topology()),
    }
    rows: list[dict[str, Any]] = []
    for phone, workload, beta in _cells():
        _, share, settled = explored(phone, workload, beta, seed=0)
        mine_s = step_time(phone, workload, settled, beta)
        mine_j = step_energy(phone, workload, settled, beta)
        row: dict[str, Any] = {
            "phone": phone.name,
            "network": workload.name,
            "beta": beta,
            "choice": settled.label(phone.topology()),
            "without_profile": 1 + share,
            "with_shared_profile": 1 + explored(phone, workload, beta, seed=0, shared=True)[1],
        }
        for name, rule in rules.items():
            choices = rule(phone)
            seconds = statistics.fmean(step_time(phone, workload, c, beta) for c in choices)
            joules = statistics.fmean(step_energy(phone, workload, c, beta) for c in choices)
            row[f"{name}: time"] = seconds / mine_s
            row[f"{name}: energy"] = joules / mine_j
        rows.append(row)
    over_beta = {
        f"beta {beta:g}": {
            name: _geometric([row[name] for row in rows if row["beta"] == beta])
            for name in ("greedy: time", "greedy: energy")
        }
        for beta in BETAS
    }
    time = [row["greedy: time"] for row in rows]
    energy = [row["greedy: energy"] for row in rows]
    means = {key: _geometric([row[key] for row in rows]) for key in rows[0] if ":" in key}
    return Claim(
        name="phone_speedup",
        value=_geometric(time),
        unit="times faster than greedy, geometric mean (SoC model)",
        better="higher",
        baseline=Baseline(name="greedy, all fast cores", value=1.0),
        ratio=_geometric(time),
        samples={
            "time_range": [min(time), max(time)],
            "energy_mean": _geometric(energy),
            "energy_range": [min(energy), max(energy)],
            "by_beta": over_beta,
            "geometric_means": means,
            "200_steps_over_oracle": {
                name: _geometric([row[name] for row in rows])
                for name in ("without_profile", "with_shared_profile")
            },
            "rows": rows,
        },
    )


def long_run(profile: Profile) -> Claim:
    """Moves per hour, at most, over simulated days with charging, heat and an owner."""
    rows: list[dict[str, Any]] = []
    for phone, workload, beta in ((PHONES[1], RESNET34, 0.0), (PHONES[4], SHUFFLENETV2, 4.0)):
        surroundings = Surroundings(owner=_owner_of(phone), charging_w=_charger)
        simulated = SimulatedPhone(
            phone,
            workload,
            beta,
            Policy(),
            surroundings=surroundings,
            unit_s=3.0,
            sample_s=profile.pick(2.0, 0.5),
            battery=True,
        )
        totals = simulated.run(until_s=3600.0 * profile.pick(12, 48))
        by_hour: dict[int, int] = {}
        for moved_s, _, _ in totals.moves:
            by_hour[int(moved_s // 3600)] = by_hour.get(int(moved_s // 3600), 0) + 1
        rows.append(
            {
                "phone": phone.name,
                "network": workload.name,
                "most_moves_per_hour": max(by_hour.values(), default=0),
                "moves": len(totals.moves),
                "hottest_c": totals.hottest_c,
                "lowest_level": totals.lowest_level,
                "largest_loan_j": totals.largest_loan,
                "allowance_j": simulated.pilot.loan.allowance_j,
                "steps": totals.steps,
                "lost_steps": totals.steps - simulated.pilot.steps,
            }
        )
    return Claim(
        name="long_run",
        value=float(max(row["most_moves_per_hour"] for row in rows)),
        unit="moves in the busiest hour (SoC model)",
        better="lower",
        baseline=Baseline(name="bound", value=60.0),
        samples={"runs": rows},
    )


def _owner_of(phone: Phone) -> Callable[[float], list[float]]:
    clusters = len(phone.cores)

    def owner(now_s: float) -> list[float]:
        hour = now_s / 3600 % 24
        busy = 8 <= hour < 23 and now_s % 1200 < 360
        return [0.6 if busy else 0.0] * clusters

    return owner


def _charger(now_s: float) -> float:
    hour = now_s / 3600 % 24
    return 10.0 if hour < 7 or hour >= 23 else 0.0


def _with_counts(phone: Phone, fast: int) -> Choice:
    topology = phone.topology()
    choices = enumerate_choices(topology)
    little = [kind == "little" for kind in (c.kind for c in topology.clusters)]
    if fast:
        return next(c for c in choices if c.threads == fast and c.counts[-1] == fast)
    only = [c for c in choices if all(n == 0 or low for n, low in zip(c.counts, little))]
    return max(only, key=lambda choice: choice.threads)


def _all_cores(phone: Phone) -> list[Choice]:
    topology = phone.topology()
    return [Choice(tuple(len(c.cores) for c in topology.clusters), topology.cores)]


def _half(phone: Phone) -> list[Choice]:
    """Half of the cores, the fastest ones."""
    topology = phone.topology()
    left, counts = len(topology.cores) // 2, []
    for cluster in reversed(topology.clusters):
        counts.append(min(left, len(cluster.cores)))
        left -= counts[-1]
    taken = tuple(reversed(counts))
    cores = tuple(c for n, g in zip(taken, topology.clusters) for c in g.cores[:n])
    return [Choice(taken, cores)]


def _geometric(values: list[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))
