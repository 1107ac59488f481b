"""What tier matching adds on its own (paper, figures 11 and 13)."""

from __future__ import annotations

from jobs.bench.venn.runs import POLICIES, TIERED_CLASSES, outcome, run, scaled_trace, tell
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.venn.simulator.workloads import BIASED, WorkloadConfig, make_workload
from raysys.federated.venn.tiers import TieredPolicy


def tier_matching(profile: Profile) -> Claim:
    """IRS with and without tier matching; FIFO too, and more tiers, on the low workload."""
    cases = [("low", inner, tiers) for inner in ("venn", "fifo") for tiers in (1, 2)]
    if profile.full:
        cases += [("low", "venn", tiers) for tiers in (3, 4)]
        cases += [(name, "venn", tiers) for name in ("high", *BIASED) for tiers in (1, 2)]
    trace = scaled_trace().with_speed_classes(TIERED_CLASSES)
    table: dict[str, dict[str, float]] = {}
    for name, inner, tiers in cases:
        workload = make_workload(WorkloadConfig(name=name))
        deadlines = [job.deadline_s for job in workload.jobs]
        policy = TieredPolicy.of(
            POLICIES[inner](), tiers=tiers, classes=TIERED_CLASSES, deadlines_s=deadlines
        )
        result = run(workload, policy, trace)
        key = f"{name}, {inner}, V={tiers}"
        table[key] = {
            "speedup": outcome(name, None, "random").mean_jct_s() / result.mean_jct_s(),
            "restricted_rounds": policy.matcher.restricted,
            "rounds": sum(job.rounds_done for job in result.jobs),
        }
        tell(f"{key}: " + ", ".join(f"{k} {value:.4g}" for k, value in table[key].items()))
    with_s, without_s = (table[f"low, venn, V={tiers}"]["speedup"] for tiers in (2, 1))
    return Claim(
        name="tier_matching",
        value=with_s,
        unit="x over random",
        better="higher",
        baseline=Baseline(name="IRS alone (V = 1)", value=without_s),
        ratio=with_s / without_s,
        samples={"table": table},
    )
