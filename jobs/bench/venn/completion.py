"""Completion times in the scaled setting: nine workloads, several seeds, every baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from jobs.bench.venn.runs import (
    POLICIES,
    QUICK,
    details,
    geomean,
    outcome,
    run,
    scaled_trace,
    table,
    tell,
)
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.venn import baselines
from raysys.federated.venn.simulator import simulate_by_event
from raysys.federated.venn.simulator.workloads import (
    BIASED,
    STANDARD,
    WorkloadConfig,
    make_workload,
)

SEEDS = (10, 11, 12, 13, 21, 22, 23)
PARTS = 4
# Student's t for a 95 % interval, by degrees of freedom
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def jct_even_speedup(profile: Profile) -> Claim:
    """Even workload over several seeds: speed-up over optimised random; FIFO and SRSF beside it."""
    seeds = profile.pick(SEEDS[:2], SEEDS)
    tables = {seed: table("even", seed, profile) for seed in seeds}
    values = [tables[seed]["venn"] for seed in seeds]
    half = _T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    best = [max(tables[seed]["fifo"], tables[seed]["srsf"]) for seed in seeds]
    return Claim(
        name="jct_even_speedup",
        value=mean,
        unit="x over random",
        better="higher",
        baseline=Baseline(name="better of FIFO and SRSF", value=statistics.mean(best)),
        ratio=mean / statistics.mean(best),
        samples={
            "interval_95": [mean - half, mean + half],
            "by_seed": {str(seed): row for seed, row in tables.items()},
            "seeds_above_fifo_and_srsf": sum(a > b for a, b in zip(values, best)),
            "details_first_seed": details("even", seeds[0], profile),
        },
        seeds=list(seeds),
    )


def jct_geomean_standard5(profile: Profile) -> Claim:
    """The five standard workloads with the authors' seed."""
    names = profile.pick(("even", "low"), STANDARD)
    return _several("jct_geomean_standard5", names, (None,), "fifo", profile)


def jct_biased4(profile: Profile) -> Claim:
    """The four biased workloads; the baseline is SRSF."""
    names = profile.pick(("general",), BIASED)
    return _several("jct_biased4", names, profile.pick((None,), (None, 3)), "srsf", profile)


def _several(
    claim: str,
    names: Sequence[str],
    seeds: Sequence[int | None],
    against: str,
    profile: Profile,
) -> Claim:
    tables = {
        f"{name}/{seed or 'authors'}": table(name, seed, profile)
        for name in names
        for seed in seeds
    }
    ours = geomean([row["venn"] for row in tables.values()])
    theirs = geomean([row[against] for row in tables.values()])
    rivals = ("fifo", "srsf", "least_attained")
    stronger = [row["venn"] / row["srsf_total"] for row in tables.values()]
    return Claim(
        name=claim,
        value=ours,
        unit="x over random",
        better="higher",
        baseline=Baseline(name=against, value=theirs),
        ratio=ours / theirs,
        samples={
            "tables": tables,
            "best_in": sum(
                t["venn"] >= max(t[r] for r in rivals if r in t) for t in tables.values()
            ),
            "over_srsf_total": {"geomean": geomean(stronger), "worst": min(stronger)},
            "details": {name: details(name, seeds[0], profile) for name in names}
            if profile.full
            else {},
        },
    )


def asynchronous_mix(profile: Profile) -> Claim:
    """Low workload, half of the jobs with buffered asynchronous aggregation, against SRSF."""
    config = WorkloadConfig(name="low", jobs=profile.pick(20, 50), buffered_share=0.5)
    workload = make_workload(config)
    found = {policy: run(workload, POLICIES[policy]()).mean_jct_s() for policy in QUICK}
    row = {policy: found["random"] / value for policy, value in found.items()}
    tell(", ".join(f"{policy} {value:.2f}" for policy, value in row.items()))
    return Claim(
        name="asynchronous_mix",
        value=row["venn"],
        unit="x over random",
        better="higher",
        baseline=Baseline(name="srsf", value=row["srsf"]),
        ratio=row["venn"] / row["srsf"],
        samples={"table": row},
    )


def other_baselines(profile: Profile) -> Claim:
    """Baselines beside the main table, on the low workload; the baseline is random per device.

    Random per device is random matching as deployed (a draw per device). The static partition gives
    every job one of four equal parts of the population.
    """
    workload = make_workload(WorkloadConfig(name="low", jobs=profile.pick(10, 50)))
    policies = {
        "fifo_by_request": baselines.fifo_by_request(),
        "round_robin": baselines.round_robin(),
        "least_attained": baselines.least_attained(),
        "random": baselines.random_per_request(),
    }
    found = {name: run(workload, policy).mean_jct_s() for name, policy in policies.items()}
    parted = scaled_trace().with_random_classes(PARTS, seed=0)
    partition = run(workload, baselines.StaticPartition(PARTS), parted)
    found["static_partition"] = partition.mean_jct_s()
    drawn = simulate_by_event(
        scaled_trace(), workload.jobs, baselines.RandomPerDevice(), workload.config()
    )
    found["random_per_device"] = drawn.mean_jct_s()
    tell(", ".join(f"{name} {value:,.0f} s" for name, value in found.items()))
    if profile.full:
        found["venn"] = outcome("low", None, "venn").mean_jct_s()
    ours, theirs = found["random"], found["random_per_device"]
    return Claim(
        name="other_baselines",
        value=ours,
        unit="s mean completion time of optimised random",
        better="lower",
        baseline=Baseline(name="random per device", value=theirs),
        ratio=ours / theirs,
        samples={"mean_jct_s": found},
    )
