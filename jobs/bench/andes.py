"""Andes benchmark: QoE-aware scheduling against first-come first-served.

In virtual time here, on the real engine in :mod:`jobs.bench.andes_engine`. Arrivals are open-loop,
every request is served to its last token and counted. "Better FCFS" is the better of two engines:
chunked prefill beside decodes, and prefill steps that stall decodes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.bench import andes_engine
from jobs.bench.andes_simulator import ABLATIONS, MACHINES, SPEED, Case, Simulations, crossing
from raysys.bench import Baseline, Claim, ClaimFunction, Profile
from raysys.serving.andes.packing import exact_pack, greedy_order, greedy_pack, pack
from raysys.serving.andes.scheduler import AndesScheduler
from raysys.serving.andes.simulator.policies import BASELINES
from raysys.serving.andes.spec import READING_CLASSES, QoESpec
from raysys.serving.andes.table import RequestTable

CONFIG: dict[str, Any] = {
    "machines": {name: dataclasses.asdict(step) for name, step in MACHINES.items()},
    "kv_tokens": 30_000,
    "step_tokens": 2048,
    "lengths": "prompt lognormal(ln 160, 1), output lognormal(ln 250, 0.8) up to 1,500",
    "readers": "reading classes by age, TTFT target max(1, prompt / 5000) s",
    "cheap_restore": "a tenth of recomputing",
    **andes_engine.ENGINE_CONFIG,
}
FCFS = ("fcfs", "fcfs_prefill_first")
_SIMULATIONS = Simulations()


def _seeds(profile: Profile) -> list[int]:
    return list(profile.pick(range(1, 4), range(1, 6)))


def _compare(case: Case, seeds: Sequence[int]) -> tuple[list[dict[str, float]], list[Any]]:
    """Our rows and the better FCFS's rows of one case over seeds, simulated in one go."""
    cases = [
        dataclasses.replace(case, seed=seed, policy=policy)
        for seed in seeds
        for policy in (case.policy, *FCFS)
    ]
    rows = _SIMULATIONS.run(cases)
    ours = rows[0::3]
    better = [max(pair, key=lambda row: row["mean_qoe"]) for pair in zip(rows[1::3], rows[2::3])]
    return ours, better


def qoe_cyclic_1p4(profile: Profile) -> Claim:
    """Mean QoE in a cyclic burst at 1.4 requests/s, about 1.4 times what FCFS sustains."""
    seeds = _seeds(profile)
    ours, fcfs = _compare(Case(load="cyclic", rate=1.4, seed=0), seeds)
    value = statistics.mean(row["mean_qoe"] for row in ours)
    base = statistics.mean(row["mean_qoe"] for row in fcfs)
    throughput = [mine["throughput"] / row["throughput"] for mine, row in zip(ours, fcfs)]
    return Claim(
        name="qoe_cyclic_1p4",
        value=value,
        unit="mean QoE",
        better="higher",
        baseline=Baseline(name="better FCFS", value=base),
        ratio=value / base,
        samples={
            "ours": ours,
            "fcfs": fcfs,
            "p10_qoe": [row["p10_qoe"] for row in ours],
            "throughput_ratio": throughput,
        },
        seeds=seeds,
    )


def _rate_claim(profile: Profile, load: str, fcfs: float, ours: float) -> Claim:
    """Highest rate with mean QoE >= 0.9 over the seeds; guesses are where the search starts."""
    seeds = _seeds(profile)
    rounds = profile.pick(1, 3)

    def search(policy: str, guess: float) -> tuple[float, dict[float, float]]:
        def mean(rate: float) -> float:
            cases = [Case(load=load, rate=rate, seed=seed, policy=policy) for seed in seeds]
            return _SIMULATIONS.mean(cases, "mean_qoe")

        return crossing(mean, 0.93 * guess, 1.07 * guess, 0.9, rounds)

    found = {policy: search(policy, fcfs) for policy in FCFS}
    name, (base, curve) = max(found.items(), key=lambda item: item[1][0])
    value, our_curve = search("andes", ours)
    return Claim(
        name=f"rate_at_qoe_0p9_{load}",
        value=value,
        unit="requests/s",
        better="higher",
        baseline=Baseline(name=name, value=base),
        ratio=value / base,
        samples={"ours": _points(our_curve), "fcfs": _points(curve)},
        seeds=seeds,
    )


def _points(curve: dict[float, float]) -> list[dict[str, float]]:
    return [{"rate": rate, "mean_qoe": qoe} for rate, qoe in curve.items()]


def rate_at_qoe_0p9_cyclic(profile: Profile) -> Claim:
    """Capacity under cyclic bursts."""
    return _rate_claim(profile, "cyclic", 1.02, 1.72)


def rate_at_qoe_0p9_poisson(profile: Profile) -> Claim:
    """Capacity under Poisson arrivals."""
    return _rate_claim(profile, "poisson", 1.78, 2.4)


def _harm_cases(profile: Profile) -> list[Case]:
    """Every trace, load and step time of the suite; loads are relative to FCFS's capacity."""
    loads = profile.pick((0.7, 1.0, 1.3), (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.8))
    length = profile.pick(400.0, 1200.0)
    rates = {"poisson": 1.75, "cyclic": 1.0, "random": 1.4, "azure": 0.19}
    return [
        Case(
            load=load,
            rate=round(min(1.0, rate * SPEED[name] * relative), 4)
            if load == "azure"
            else round(rate * SPEED[name] * relative, 4),
            seed=0,
            duration_s=length,
            machine=name,
        )
        for name in MACHINES
        for load, rate in rates.items()
        for relative in loads
    ]


def _harm_table(profile: Profile) -> list[dict[str, Any]]:
    """Differences to the better FCFS, one row per case and seed."""
    seeds = profile.pick([1, 2, 3], [1, 2, 3, 4, 5])
    cases = _harm_cases(profile)
    # The quick profile gives each case one of the seeds in turn, the full one all of them.
    chosen = [(case, seed) for i, case in enumerate(cases)
              for seed in (seeds if profile.full else [seeds[i % 3]])]  # fmt: skip
    all_runs = [
        dataclasses.replace(case, seed=seed, policy=policy)
        for case, seed in chosen
        for policy in (case.policy, *FCFS)
    ]
    _SIMULATIONS.run(all_runs)
    table = []
    for case, seed in chosen:
        ours, fcfs = _compare(case, [seed])
        table.append(
            {
                "load": case.load,
                "rate": case.rate,
                "machine": case.machine,
                "seed": seed,
                "fcfs": fcfs[0]["mean_qoe"],
                "ours": ours[0]["mean_qoe"],
                "difference": ours[0]["mean_qoe"] - fcfs[0]["mean_qoe"],
                "throughput_ratio": ours[0]["throughput"] / fcfs[0]["throughput"],
            }
        )
    return table


def do_no_harm(profile: Profile) -> Claim:
    """Worst difference of mean QoE to the better FCFS over the suite."""
    table = _harm_table(profile)
    worst = min(table, key=lambda row: row["difference"])
    return Claim(
        name="do_no_harm",
        value=worst["difference"],
        unit="mean QoE",
        better="higher",
        samples={"worst": worst, "table": table},
        seeds=sorted({row["seed"] for row in table}),
    )


def do_no_harm_throughput(profile: Profile) -> Claim:
    """Worst throughput relative to the better FCFS over the same suite."""
    table = _harm_table(profile)
    worst = min(table, key=lambda row: row["throughput_ratio"])
    return Claim(
        name="do_no_harm_throughput",
        value=worst["throughput_ratio"],
        unit="of the better FCFS",
        better="higher",
        samples={"worst": worst},
        seeds=sorted({row["seed"] for row in table}),
    )


def azure_conversation(profile: Profile) -> Claim:
    """Azure conversation trace, thinned to near saturation, without and with cheap restore."""
    seeds = _seeds(profile)
    length = profile.pick(1200.0, 3480.0)
    case = Case(load="azure", rate=0.2, seed=0, duration_s=length)
    ours, fcfs = _compare(case, seeds)
    cheap = _SIMULATIONS.run([dataclasses.replace(case, seed=s, cheap=True) for s in seeds])
    base = statistics.mean(row["mean_qoe"] for row in fcfs)
    value = statistics.mean(row["mean_qoe"] for row in ours)
    return Claim(
        name="azure_conversation",
        value=value - base,
        unit="mean QoE above FCFS",
        better="higher",
        baseline=Baseline(name="better FCFS, mean QoE", value=base),
        samples={
            "mean_qoe": value,
            "mean_qoe_cheap_restore": statistics.mean(row["mean_qoe"] for row in cheap),
            "gain_cheap_restore": statistics.mean(row["mean_qoe"] for row in cheap) - base,
            "throughput_ratio": [a["throughput"] / b["throughput"] for a, b in zip(ours, fcfs)],
            "ours": ours,
            "cheap": cheap,
            "fcfs": fcfs,
        },
        seeds=seeds,
    )


def overloaded_table(requests: int, seed: int) -> tuple[RequestTable, Any, float]:
    """A crowded engine: a full batch and a long queue of new and paused requests."""
    rng = np.random.default_rng(seed)
    table = RequestTable(requests)
    taus = [row.tau_s for row in READING_CLASSES]
    for _ in range(requests):
        spec = QoESpec(ttft_s=1.0, tds=1.0 / float(rng.choice(taus)))
        age = float(rng.uniform(0.0, 120.0))
        slot = table.add(spec, -age, int(rng.lognormal(5.0, 1.0)) + 4)
        made = int(rng.integers(0, 12) * age) if rng.random() < 0.6 else 0
        if made:
            table.deliver_chunk(slot, -rng.uniform(0.0, age), made)
            table.context_tokens[slot] += made
    slots = table.live_slots()
    capacity = 60.0 * requests
    full = np.cumsum(table.context_tokens[slots]) < 0.98 * capacity
    running = slots[full]
    table.running[running] = table.pausable[running] = True
    table.missing_tokens[running] = 0.0
    waiting = slots[~full]
    table.missing_tokens[waiting] = table.context_tokens[waiting]
    return table, slots, capacity


def _plan_times_ms(requests: int, repeats: int, seeds: Sequence[int]) -> list[float]:
    times = []
    for seed in seeds:
        table, slots, capacity = overloaded_table(requests, seed)
        held = float(table.context_tokens[slots][table.running[slots]].sum())
        scheduler = AndesScheduler()
        for repeat in range(repeats + 3):
            started = time.thread_time()
            snapshot = table.snapshot(
                repeat * 0.08,
                slots,
                capacity_tokens=capacity,
                free_tokens=capacity - held,
                max_batch=4096,
                step_tokens=2048,
            )
            scheduler.plan(snapshot)
            if repeat >= 3:  # the first calls fill caches
                times.append(1000.0 * (time.thread_time() - started))
    return times


def _plan_claim(profile: Profile, requests: int) -> Claim:
    seeds = _seeds(profile)
    times = _plan_times_ms(requests, profile.pick(100, 400), seeds)
    return Claim(
        name=f"plan_ms_p99_{requests}",
        value=float(np.percentile(times, 99)),
        unit="ms",
        better="lower",
        samples={"median": statistics.median(times), "max": max(times), "plans": len(times)},
        seeds=seeds,
    )


def plan_ms_p99_500(profile: Profile) -> Claim:
    """Processor time of a snapshot and a plan for 500 live requests."""
    return _plan_claim(profile, 500)


def plan_ms_p99_5000(profile: Profile) -> Claim:
    """Processor time of a snapshot and a plan for 5,000 live requests."""
    return _plan_claim(profile, 5000)


def plan_share_of_step(profile: Profile) -> Claim:
    """Processor time of planning over the engine's step time, in the cyclic burst."""
    seeds = _seeds(profile)
    rows = _SIMULATIONS.run([Case(load="cyclic", rate=1.4, seed=seed) for seed in seeds])
    return Claim(
        name="plan_share_of_step",
        value=statistics.median(row["plan_share"] for row in rows),
        unit="of step time",
        better="lower",
        samples=[row["plan_share"] for row in rows],
        seeds=seeds,
    )


def dp_gap(profile: Profile) -> Claim:
    """How far greedy packing stays below dynamic programming, on random instances."""
    rng = np.random.default_rng(1)
    gaps, literal = [], []
    spent = {"greedy": 0.0, "exact": 0.0}
    for _ in range(1000):
        size = int(rng.integers(8, 20))
        weight = np.maximum(1, rng.lognormal(3.2, 0.8, size)).astype(np.int64)
        value = rng.uniform(0.0, 1.0, size)
        batch = int(rng.integers(2, size + 1))
        room = int(rng.uniform(0.2, 0.9) * weight.sum())
        started = time.thread_time()
        size_N = weight.astype(np.float64)
        chosen = greedy_pack(value, size_N, batch, room)
        middle = time.thread_time()
        best = float(value[exact_pack(value, weight, batch, room)].sum())
        spent["greedy"] += middle - started
        spent["exact"] += time.thread_time() - middle
        if best > 0:
            gaps.append(1.0 - float(value[chosen].sum()) / best)
            order = greedy_order(value, size_N)
            stop = pack(order, value, size_N, batch, room, skip_misfits=False)
            literal.append(1.0 - float(value[stop].sum()) / best)
    return Claim(
        name="dp_gap",
        value=statistics.mean(gaps),
        unit="share of the optimum lost",
        better="lower",
        baseline=Baseline(
            name="by value per length, stop at misfit", value=statistics.mean(literal)
        ),
        ratio=statistics.mean(gaps) / statistics.mean(literal),
        samples={"worst": max(gaps), "speedup": spent["exact"] / spent["greedy"]},
        seeds=[1],
    )


def ablations(profile: Profile) -> Claim:
    """Parts of the planner switched off, and the other policies, in the cyclic burst at 1.5."""
    length = profile.pick(400.0, 1200.0)
    seeds = profile.pick([1], [1, 2, 3])
    names = [*ABLATIONS, "andes, no controller", *BASELINES, "fcfs_prefill_first"]

    def case(name: str, seed: int) -> Case:
        policy, _, off = name.partition(", ")
        return Case(load="cyclic", rate=1.5, seed=seed, duration_s=length, policy=policy,
                    controller=not off)  # fmt: skip

    _SIMULATIONS.run([case(name, seed) for name in names for seed in seeds])
    table = {}
    for name in names:
        rows = _SIMULATIONS.run([case(name, seed) for seed in seeds])
        table[name] = {key: statistics.mean(row[key] for row in rows) for key in
                       ("mean_qoe", "p10_qoe", "share_good", "mean_ttft_s", "throughput",
                        "preemptions_per_request")}  # fmt: skip
    return Claim(
        name="ablations",
        value=table["andes"]["mean_qoe"],
        unit="mean QoE",
        better="higher",
        baseline=Baseline(name="fcfs", value=table["fcfs"]["mean_qoe"]),
        ratio=table["andes"]["mean_qoe"] / table["fcfs"]["mean_qoe"],
        samples=table,
        seeds=seeds,
    )


CLAIMS: dict[str, ClaimFunction] = {
    "qoe_cyclic_1p4": qoe_cyclic_1p4,
    "rate_at_qoe_0p9_cyclic": rate_at_qoe_0p9_cyclic,
    "rate_at_qoe_0p9_poisson": rate_at_qoe_0p9_poisson,
    "do_no_harm": do_no_harm,
    "do_no_harm_throughput": do_no_harm_throughput,
    "azure_conversation": azure_conversation,
    "plan_ms_p99_500": plan_ms_p99_500,
    "plan_ms_p99_5000": plan_ms_p99_5000,
    "plan_share_of_step": plan_share_of_step,
    "dp_gap": dp_gap,
    "ablations": ablations,
    **andes_engine.CLAIMS,
}
