"""How many jobs get at least their fair share, and what that costs (paper, section 4.4, figure 14).

The fair share of job i is ``M_i`` times its time alone (simulated), with ``M_i`` the mean number of
jobs in flight during its life. Two times are compared: the completion time, and the scheduling
latency (completion time less the responses of its rounds, against ``M_i`` times the same alone),
which is the stricter one. ``M_i`` is taken from the run under random matching, so that every policy
faces the same limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.bench.venn.runs import POLICIES, outcome, run, scaled_trace, tell
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.venn import baselines
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.simulator import SimResult, simulate
from raysys.federated.venn.simulator.workloads import Workload, WorkloadConfig, make_workload

Floats = npt.NDArray[np.float64]
# Published trade (figure 14): eps -> speed-up, share of jobs within their fair share
PAPER = {0: (1.86, 0.25), 0.5: (1.54, 0.44), 1: (1.51, 0.54), 2: (1.46, 0.69), 4: (1.42, 0.77)}
_FORMS = {
    "round": IRSConfig(),
    "total": IRSConfig(demand_scope="total"),
    "venn": IRSConfig(demand_scope="total", yield_factor=2.0),
}


@dataclass(frozen=True, slots=True)
class _Limits:
    """Fair completion time and scheduling latency of every job, and its responses alone; s."""

    completion_s: Floats
    latency_s: Floats
    response_s: Floats

    def judge(self, result: SimResult) -> dict[str, float]:
        jct_s = np.asarray([job.jct_s for job in result.jobs])
        return {
            "met": float(np.mean(jct_s <= self.completion_s)),
            "latency_met": float(np.mean(jct_s - self.response_s <= self.latency_s)),
        }


def fair_share_met(profile: Profile) -> Claim:
    """Share of jobs within their fair-share completion time at eps = 2, and the whole trade."""
    workload = make_workload(WorkloadConfig(seed=10))
    random = outcome("even", 10, "random")
    limits = _limits(workload, random)
    curve: dict[str, dict[str, float]] = {}

    def note(name: str, result: SimResult) -> None:
        speed = random.mean_jct_s() / result.mean_jct_s()
        curve[name] = {"speedup": speed, **limits.judge(result)}
        tell(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in curve[name].items()))

    for name in POLICIES if profile.full else ("random", "srsf_total"):
        note(name, outcome("even", 10, name))
    for form in profile.pick(("venn",), tuple(_FORMS)):
        for eps in profile.pick((0.0, 2.0), (0.0, 0.5, 1.0, 2.0, 4.0)):
            config = _FORMS[form]
            chosen = IRSConfig(
                demand_scope=config.demand_scope, yield_factor=config.yield_factor, eps=eps
            )
            note(f"{form}/{eps:g}", run(workload, IRS(chosen)))
    ours = curve["venn/2"]["met"]
    return Claim(
        name="fair_share_met",
        value=ours,
        unit="share of jobs at eps = 2",
        better="higher",
        baseline=Baseline(name="random matching", value=curve["random"]["met"]),
        ratio=ours / curve["random"]["met"] if curve["random"]["met"] else None,
        samples={"curve": curve, "published": {f"{eps:g}": pair for eps, pair in PAPER.items()}},
        seeds=[10],
    )


def _limits(workload: Workload, random: SimResult) -> _Limits:
    alone = [
        simulate(scaled_trace(), [job], baselines.fifo(), workload.config()).jobs[0]
        for job in workload.jobs
    ]
    together = np.asarray([_overlap(random, index) for index in range(len(alone))])
    response_s = np.asarray([job.response_s for job in alone])
    jct_s = np.asarray([job.jct_s for job in alone])
    return _Limits(together * jct_s, together * (jct_s - response_s), response_s)


def _overlap(result: SimResult, index: int) -> float:
    """Mean number of jobs in flight during the life of a job, itself included."""
    mine = result.jobs[index]
    shared: Sequence[float] = [
        max(min(mine.finish_s, job.finish_s) - max(mine.arrival_s, job.arrival_s), 0.0)
        for job in result.jobs
    ]
    return sum(shared) / mine.jct_s
