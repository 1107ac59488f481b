"""Venn: completion times, simulator, planner and live service against their baselines."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from jobs.bench import venn_live
from raysys import machine
from raysys.bench import Baseline, Claim, Profile, paired_claim
from raysys.federated.venn import baselines
from raysys.federated.venn.columns import RequestColumns
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy, Request
from raysys.federated.venn.simulator import SimResult, Trace, simulate, simulate_by_event
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.results import speedup_by_class, speedup_of_smallest
from raysys.federated.venn.simulator.workloads import (
    BIASED,
    GROUP_NAMES,
    STANDARD,
    Workload,
    WorkloadConfig,
    make_workload,
)
from raysys.federated.venn.supply import SupplyView
from raysys.federated.venn.tiers import TieredPolicy

DEVICES = 10_775
SEEDS = (10, 11, 12, 13, 21, 22, 23)
CONFIG = {
    "devices": DEVICES,
    "trace": "FedScale-like (reconstructed) where the data folder is present, else generated",
    "scale": "participants / 10, rounds / 20, gaps / 20",
    "venn": "IRS, total remaining demand, owners yield to jobs half their size",
    "venn_round": "IRS, demand of the open round: the paper's default",
    "eligibility": "always enforced",
    "success_rule": "released",
}

PolicyFactory = Callable[[], Policy]
POLICIES: dict[str, PolicyFactory] = {
    "random": baselines.random_per_request,
    "fifo": baselines.fifo,
    "srsf": baselines.srsf,
    "srsf_total": baselines.srsf_total,
    "venn_round": IRS,
    "venn_total": lambda: IRS(IRSConfig(demand_scope="total")),
    "venn": lambda: IRS(IRSConfig(demand_scope="total", yield_factor=2.0)),
}


@cache
def scaled_trace() -> Trace:
    """The device trace of the scaled setting."""
    folder = machine.data_dir()
    return load_trace(folder, DEVICES) if folder else generated_trace(159_000)


def _simulate(workload: Workload, policy: Policy, trace: Trace | None = None) -> SimResult:
    return simulate(trace or scaled_trace(), workload.jobs, policy, workload.config())


@cache
def outcome(name: str, seed: int | None, policy: str) -> SimResult:
    """One scaled run; kept, since several claims look at the same ones."""
    workload = make_workload(WorkloadConfig(name=name, seed=seed))
    return _simulate(workload, POLICIES[policy]())


def _table(name: str, seed: int | None) -> dict[str, float]:
    """Speed-up of the mean completion time over random, by policy."""
    base = outcome(name, seed, "random").mean_jct_s()
    return {policy: base / outcome(name, seed, policy).mean_jct_s() for policy in POLICIES}


def _details(name: str, seed: int | None) -> dict[str, object]:
    random, ours = outcome(name, seed, "random"), outcome(name, seed, "venn")
    by_class = speedup_by_class(random, ours, len(GROUP_NAMES))
    return {
        "by_class": {
            label: value for label, value in zip(GROUP_NAMES, by_class) if math.isfinite(value)
        },
        "lowest_demand": {
            f"{share:.0%}": speedup_of_smallest(random, ours, share) for share in (0.25, 0.5, 0.75)
        },
        "mean_jct_s": {policy: outcome(name, seed, policy).mean_jct_s() for policy in POLICIES},
        "mean_queueing_s": {
            policy: outcome(name, seed, policy).mean_queueing_s() for policy in POLICIES
        },
        "aborted": {
            policy: sum(job.aborted for job in outcome(name, seed, policy).jobs)
            for policy in POLICIES
        },
        "wasted_share": {policy: outcome(name, seed, policy).wasted_share() for policy in POLICIES},
    }


def jct_even_speedup(profile: Profile) -> Claim:
    """Even workload over several seeds: speed-up over optimised random; FIFO and SRSF beside it."""
    seeds = profile.pick(SEEDS[:2], SEEDS)
    tables = {seed: _table("even", seed) for seed in seeds}
    values = [tables[seed]["venn"] for seed in seeds]
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
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
            "by_seed": {str(seed): table for seed, table in tables.items()},
            "seeds_above_fifo_and_srsf": sum(a > b for a, b in zip(values, best)),
            "details_first_seed": _details("even", seeds[0]),
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
    tables = {f"{name}/{seed or 'authors'}": _table(name, seed) for name in names for seed in seeds}
    ours = _geomean([table["venn"] for table in tables.values()])
    theirs = _geomean([table[against] for table in tables.values()])
    rivals = ("fifo", "srsf")
    return Claim(
        name=claim,
        value=ours,
        unit="x over random",
        better="higher",
        baseline=Baseline(name=against, value=theirs),
        ratio=ours / theirs,
        samples={
            "tables": tables,
            "best_in": sum(t["venn"] >= max(t[r] for r in rivals) for t in tables.values()),
            "at_least_srsf_total_in": sum(t["venn"] >= t["srsf_total"] for t in tables.values()),
            "details": {name: _details(name, seeds[0]) for name in names} if profile.full else {},
        },
    )


def fair_share_met(profile: Profile) -> Claim:
    """Share of jobs within their fair-share completion time, over the starvation knob.

    The fair share of job i is M_i times its completion time alone (simulated), with M_i the mean
    number of jobs in flight during its life under random matching.
    """
    workload = make_workload(WorkloadConfig(seed=10))
    random = outcome("even", 10, "random")
    fair = _fair_times(workload, random)
    knobs = profile.pick((0.0, 2.0), (0.0, 0.5, 1.0, 2.0, 4.0))
    curve = {}
    for scope in ("round", "total"):
        for eps in knobs:
            config = IRSConfig(demand_scope=scope, eps=eps)
            result = _simulate(workload, IRS(config))
            met = [job.jct_s <= limit for job, limit in zip(result.jobs, fair)]
            speed = random.mean_jct_s() / result.mean_jct_s()
            curve[f"{scope}/{eps:g}"] = {"met": float(np.mean(met)), "speedup": speed}
    for name in ("random", "fifo", "srsf", "srsf_total", "venn"):
        run = outcome("even", 10, name)
        met = [job.jct_s <= limit for job, limit in zip(run.jobs, fair)]
        speed = random.mean_jct_s() / run.mean_jct_s()
        curve[name] = {"met": float(np.mean(met)), "speedup": speed}
    ours = curve["total/2"]["met"]
    return Claim(
        name="fair_share_met",
        value=ours,
        unit="share of jobs at eps = 2",
        better="higher",
        baseline=Baseline(name="random matching", value=curve["random"]["met"]),
        ratio=ours / curve["random"]["met"] if curve["random"]["met"] else None,
        samples={"curve": curve},
        seeds=[10],
    )


def _fair_times(workload: Workload, random: SimResult) -> list[float]:
    limits = []
    for job, run in zip(workload.jobs, random.jobs):
        alone = simulate(scaled_trace(), [job], baselines.fifo(), workload.config()).jobs[0].jct_s
        overlap = sum(
            max(min(run.finish_s, other.finish_s) - max(run.arrival_s, other.arrival_s), 0.0)
            for other in random.jobs
        )
        limits.append(alone * overlap / run.jct_s)
    return limits


def tier_matching(profile: Profile) -> Claim:
    """What tier matching adds to IRS, and to FIFO, over the number of tiers (low workload)."""
    workload = make_workload(WorkloadConfig(name="low"))
    base = outcome("low", None, "random").mean_jct_s()
    trace = scaled_trace().with_speed_classes(12)
    deadlines = [job.deadline_s for job in workload.jobs]
    table = {}
    for name, inner in {"venn": POLICIES["venn"], "fifo": POLICIES["fifo"]}.items():
        for tiers in profile.pick((1, 2), (1, 2, 3, 4)):
            policy = TieredPolicy.of(inner(), tiers=tiers, classes=12, deadlines_s=deadlines)
            result = _simulate(workload, policy, trace)
            table[f"{name}, V={tiers}"] = base / result.mean_jct_s()
    return Claim(
        name="tier_matching",
        value=table["venn, V=2"],
        unit="x over random",
        better="higher",
        baseline=Baseline(name="IRS alone (V = 1)", value=table["venn, V=1"]),
        ratio=table["venn, V=2"] / table["venn, V=1"],
        samples={"table": table},
    )


def random_per_device(profile: Profile) -> Claim:
    """Random matching as deployed (a draw per device) against the optimised form."""
    workload = make_workload(WorkloadConfig(name="low", jobs=profile.pick(20, 50)))
    ours = _simulate(workload, POLICIES["random"]()).mean_jct_s()
    drawn = simulate_by_event(
        scaled_trace(), workload.jobs, baselines.RandomPerDevice(), workload.config()
    )
    theirs = drawn.mean_jct_s()
    return Claim(
        name="random_per_device",
        value=ours,
        unit="s mean completion time of optimised random",
        better="lower",
        baseline=Baseline(name="random per device", value=theirs),
        ratio=ours / theirs,
    )


def full_even_simulation_s(profile: Profile) -> Claim:
    """Full-size even workload on one core, CPU seconds and resident memory (own process)."""
    command = [sys.executable, "-m", "jobs.bench.venn_full", str(profile.pick(5, 50))]
    output = subprocess.run(
        command, cwd=machine.app_root(), capture_output=True, text=True, check=True
    )
    measured = json.loads(output.stdout)
    return Claim(
        name="full_even_simulation_s",
        value=measured["cpu_s"],
        unit="s of one core",
        better="lower",
        samples=measured,
    )


def plan_ms(profile: Profile) -> Claim:
    """Time of one plan over columns (and from objects); the baseline is SRSF's sort of objects."""
    samples = {}
    for jobs, groups, atoms in ((50, 4, 5), (1000, 100, 256), (10_000, 100, 1024)):
        problem = _planning_problem(jobs, groups, atoms)
        requests, view = problem
        columns = RequestColumns.of(requests)
        planner = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))
        ours = _milliseconds(partial(planner.plan_columns, columns, view), profile)
        objects = _milliseconds(partial(planner.plan, requests, view, 0.0), profile)
        srsf = baselines.srsf_total()
        theirs = _milliseconds(partial(srsf.plan, requests, view, 0.0), profile)
        samples[f"{jobs}x{groups}"] = {"ours": ours, "from_objects": objects, "srsf": theirs}
    main = samples["1000x100"]
    claim = paired_claim(
        "plan_ms",
        "ms for 1,000 jobs in 100 groups",
        "lower",
        ours=main["ours"],
        baseline_name="SRSF's sort",
        baseline=main["srsf"],
        extra={
            name: {side: statistics.median(values) for side, values in sides.items()}
            for name, sides in samples.items()
        },
    )
    return claim


def _planning_problem(jobs: int, groups: int, atoms: int) -> tuple[list[Request], SupplyView]:
    generator = np.random.default_rng(jobs)
    masks = [
        sum(1 << int(group) for group in set(generator.integers(0, groups, 10).tolist()))
        for _ in range(atoms)
    ]
    view = SupplyView.build(masks, generator.random(atoms).tolist(), groups)
    sizes, owners = generator.integers(1, 2000, jobs), generator.integers(0, groups, jobs)
    requests = [
        Request(
            job=i,
            group=int(owners[i]),
            demand=int(sizes[i]),
            remaining=int(sizes[i]),
            rounds=100,
            opened_s=float(i % 97),
        )
        for i in range(jobs)
    ]
    return requests, view


def _milliseconds(work: Callable[[], object], profile: Profile) -> list[float]:
    work()
    times = []
    for _ in range(profile.pick(20, 100)):
        started_s = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started_s))
    return times


def _geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))


CLAIMS = {
    "jct_even_speedup": jct_even_speedup,
    "jct_geomean_standard5": jct_geomean_standard5,
    "jct_biased4": jct_biased4,
    "fair_share_met": fair_share_met,
    "tier_matching": tier_matching,
    "random_per_device": random_per_device,
    "full_even_simulation_s": full_even_simulation_s,
    "plan_ms": plan_ms,
    "checkins_per_second_grpc": venn_live.checkins_per_second_grpc,
    "unary_checkins_per_cpu_second": venn_live.unary_checkins_per_cpu_second,
    "live_vs_simulated": venn_live.live_vs_simulated,
    "recovery_after_kill_s": venn_live.recovery_after_kill_s,
}
