"""Scaled simulations that several claims look at, and what is read from them."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache

from raysys import machine
from raysys.bench import Profile
from raysys.federated.venn import baselines
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy
from raysys.federated.venn.simulator import SimResult, Trace, simulate
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.results import speedup_by_class, speedup_of_smallest
from raysys.federated.venn.simulator.workloads import (
    GROUP_NAMES,
    Workload,
    WorkloadConfig,
    make_workload,
)

DEVICES = 10_775
TIERED_CLASSES = 12

POLICIES: dict[str, Callable[[], Policy]] = {
    "random": baselines.random_per_request,
    "fifo": baselines.fifo,
    "srsf": baselines.srsf,
    "srsf_total": baselines.srsf_total,
    "least_attained": baselines.least_attained,
    "venn_round": IRS,
    "venn_total": lambda: IRS(IRSConfig(demand_scope="total")),
    "venn": lambda: IRS(IRSConfig(demand_scope="total", yield_factor=2.0)),
}


QUICK = ("random", "fifo", "srsf", "srsf_total", "venn")


def tell(text: str) -> None:
    """One line of progress."""
    print(f"venn:   {text}", file=sys.stderr, flush=True)


@cache
def scaled_trace() -> Trace:
    """The device trace of the scaled setting."""
    folder = machine.data_dir()
    return load_trace(folder, DEVICES) if folder else generated_trace(159_000)


def run(workload: Workload, policy: Policy, trace: Trace | None = None) -> SimResult:
    """One simulation in the scaled setting."""
    return simulate(trace or scaled_trace(), workload.jobs, policy, workload.config())


@cache
def outcome(name: str, seed: int | None, policy: str) -> SimResult:
    """One scaled run; kept, since several claims look at the same ones."""
    return run(make_workload(WorkloadConfig(name=name, seed=seed)), POLICIES[policy]())


def table(name: str, seed: int | None, profile: Profile) -> dict[str, float]:
    """Speed-up of the mean completion time over random, by policy (the main ones when quick)."""
    base = outcome(name, seed, "random").mean_jct_s()
    policies = profile.pick(QUICK, tuple(POLICIES))
    found = {policy: base / outcome(name, seed, policy).mean_jct_s() for policy in policies}
    row = ", ".join(f"{policy} {value:.2f}" for policy, value in found.items())
    tell(f"{name}, seed {seed or 'of the authors'}: {row}")
    return found


def details(name: str, seed: int | None, profile: Profile) -> dict[str, object]:
    """By class, by demand, waits and waste of one workload."""
    random, ours = outcome(name, seed, "random"), outcome(name, seed, "venn")
    by_class = speedup_by_class(random, ours, len(GROUP_NAMES))
    policies = profile.pick(QUICK, tuple(POLICIES))
    runs = {policy: outcome(name, seed, policy) for policy in policies}
    return {
        "by_class": {
            label: value for label, value in zip(GROUP_NAMES, by_class) if math.isfinite(value)
        },
        "lowest_demand": {
            f"{share:.0%}": speedup_of_smallest(random, ours, share) for share in (0.25, 0.5, 0.75)
        },
        "mean_jct_s": {policy: result.mean_jct_s() for policy, result in runs.items()},
        "mean_queueing_s": {policy: result.mean_queueing_s() for policy, result in runs.items()},
        "aborted": {
            policy: sum(job.aborted for job in result.jobs) for policy, result in runs.items()
        },
        "wasted_share": {policy: result.wasted_share() for policy, result in runs.items()},
    }


def geomean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.mean(math.log(value) for value in values))
