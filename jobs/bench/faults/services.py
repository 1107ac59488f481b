"""Venn, Swan and Andes: gateways, leaders, on-device trainings and engines die under load."""

from __future__ import annotations

import asyncio

from actors.venn.chaos import Chaos, ChaosConfig
from actors.venn.processes import deployment
from jobs.bench.faults.plan import Tally
from jobs.bench.swan.moves import run_kills
from raysys import scratch
from raysys.bench import Claim, Profile

LEAST_REFILLED = 0.8  # of a round's devices; the rest is on its way when the books are closed


def venn(profile: Profile) -> Claim:
    """Gateways and the leading scheduler die under load; leases are counted at the devices."""
    config = ChaosConfig(kills=profile.pick(4, 40), jobs=profile.pick(100, 1000), seed=13)
    with scratch.folder("faults") as folder, deployment(folder, gateways=2) as running:
        report = asyncio.run(Chaos(running, config).run())
    tally = Tally()
    tally.kills["gateway"] = report.kills["gateway"] + report.kills["both"]
    tally.kills["scheduler"] = report.kills["scheduler"] + report.kills["both"]
    row = {
        "kills": dict(tally.kills),
        "over_assigned": report.over_assigned,
        "most_live": report.most_live,
        "demand": config.demand,
        "assigned": report.assigned,
        "least_refilled": report.least_refilled,
        "jobs_before": config.jobs,
        "jobs_after": report.jobs_after,
        "longest_recovery_s": max(report.recovery_s, default=0.0),
    }
    row["held"] = (
        report.over_assigned == 0
        and report.jobs_after == config.jobs
        and report.least_refilled > LEAST_REFILLED
    )
    tally.trials.append(row)
    promise = "no device granted twice, no job and no lease lost for good"
    return tally.claim("venn", promise, config.seed)


def swan(profile: Profile) -> Claim:
    """An on-device training dies again and again and goes on from its last save."""
    with scratch.folder("faults") as folder:
        found = run_kills(folder, profile.pick(5, 50), 0.2, profile.pick(600, 2000))
    tally = Tally()
    tally.late["training"] = found["finished_before_the_kill"]
    tally.kills["training"] = found["kills"] - tally.late["training"]
    held = found["equal_to_a_run_without_kills"]
    tally.trials.append({**found, "kills": dict(tally.kills), "held": held})
    return tally.claim("swan", "the end equals a run without kills, bit by bit", 0)
