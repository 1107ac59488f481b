"""Andes' claims in virtual time: QoE-aware scheduling against first-come first-served.

Arrivals are open-loop, every request is served to its last token and counted. "Better FCFS" is the
better of two engines: chunked prefill beside decodes, and prefill steps that stall decodes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.andes.cases import ABLATIONS, MACHINES, SPEED, Case, Simulations, crossing
from raysys.bench import Baseline, Claim, ClaimFunction, Profile
from raysys.serving.andes.simulator.policies import BASELINES

FCFS = ("fcfs", "fcfs_prefill_first")
_SIMULATIONS = Simulations()


def simulations(profile: Profile) -> Simulations:
    """Runs of this process; kept on disk where they are many or a folder is named, so that a run
    that was interrupted goes on.
    """
    if profile.full or profile.partial:
        _SIMULATIONS.keep(Path(profile.partial) if profile.partial else None)
    return _SIMULATIONS


def _seeds(profile: Profile) -> list[int]:
    return list(profile.pick(range(1, 4), range(1, 6)))


def _compare(
    profile: Profile, case: Case, seeds: Sequence[int]
) -> tuple[list[dict[str, float]], list[Any]]:
    """Our rows and the better FCFS's rows of one case over seeds, simulated in one go."""
    cases = [
        dataclasses.replace(case, seed=seed, policy=policy)
        for seed in seeds
        for policy in (case.policy, *FCFS)
    ]
    rows = simulations(profile).run(cases)
    ours = rows[0::3]
    better = [max(pair, key=lambda row: row["mean_qoe"]) for pair in zip(rows[1::3], rows[2::3])]
    return ours, better


def qoe_cyclic_1p4(profile: Profile) -> Claim:
    """Mean QoE in a cyclic burst at 1.4 requests/s, about 1.4 times what FCFS sustains."""
    seeds = _seeds(profile)
    ours, fcfs = _compare(profile, Case(load="cyclic", rate=1.4, seed=0), seeds)
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


def _rate_claim(
    profile: Profile, load: str, fcfs: float, ours: float, duration_s: float = 1200.0
) -> Claim:
    """Highest rate with mean QoE >= 0.9 over the seeds; guesses are where the search starts."""
    seeds = _seeds(profile)

    def search(policy: str, guess: float) -> tuple[float, dict[float, float]]:
        def mean(rate: float) -> float:
            cases = [
                Case(load=load, rate=rate, seed=seed, policy=policy, duration_s=duration_s)
                for seed in seeds
            ]
            return simulations(profile).mean(cases, "mean_qoe")

        # FCFS falls off a cliff, so interpolating in a wide bracket would put it too low.
        rounds = profile.pick(2 if policy in FCFS else 0, 3)
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
    return _rate_claim(profile, "cyclic", 0.94, 1.66)


def rate_at_qoe_0p9_poisson(profile: Profile) -> Claim:
    """Capacity under Poisson arrivals; over ten minutes in the quick profile."""
    return _rate_claim(profile, "poisson", 1.8, 2.83, profile.pick(600.0, 1200.0))


def harm_cases(profile: Profile) -> list[Case]:
    """Every trace, load and step time of the suite; loads are relative to FCFS's capacity."""
    loads = profile.pick((0.9, 1.3), (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.8))
    length = profile.pick(300.0, 1200.0)
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
    seeds = [1, 2, 3]
    cases = harm_cases(profile)
    # The quick profile gives each case one of the seeds in turn, the full one all of them.
    chosen = [(case, seed) for i, case in enumerate(cases)
              for seed in (seeds if profile.full else [seeds[i % 3]])]  # fmt: skip
    all_runs = [
        dataclasses.replace(case, seed=seed, policy=policy)
        for case, seed in chosen
        for policy in (case.policy, *FCFS)
    ]
    simulations(profile).run(all_runs)
    table = []
    for case, seed in chosen:
        ours, fcfs = _compare(profile, case, [seed])
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
    ours, fcfs = _compare(profile, case, seeds)
    cheap = simulations(profile).run([dataclasses.replace(case, seed=s, cheap=True) for s in seeds])
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


def plan_share_of_step(profile: Profile) -> Claim:
    """Processor time of planning over the engine's step time, in the cyclic burst."""
    seeds = _seeds(profile)
    rows = simulations(profile).run([Case(load="cyclic", rate=1.4, seed=seed) for seed in seeds])
    return Claim(
        name="plan_share_of_step",
        value=statistics.median(row["plan_share"] for row in rows),
        unit="of step time",
        better="lower",
        samples=[row["plan_share"] for row in rows],
        seeds=seeds,
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

    simulations(profile).run([case(name, seed) for name in names for seed in seeds])
    table = {}
    for name in names:
        rows = simulations(profile).run([case(name, seed) for seed in seeds])
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
    "plan_share_of_step": plan_share_of_step,
    "ablations": ablations,
}
