"""Venn: completion times, simulator, planner and live service against their baselines.

Every claim runs alone with ``--only``; the long ones tell each row of their tables on standard
error as soon as it is known.
"""

from __future__ import annotations

from jobs.bench.venn import completion, fairness, matching, planning, service
from jobs.bench.venn.runs import DEVICES, TIERED_CLASSES

CONFIG = {
    "devices": DEVICES,
    "trace": "FedScale-like (reconstructed) where the data folder is present, else generated",
    "scale": "participants / 10, rounds / 20, gaps / 20",
    "venn": "IRS, total remaining demand, owners yield to jobs half their size",
    "venn_round": "IRS, demand of the open round: the paper's default",
    "eligibility": "always enforced",
    "success_rule": "released",
    "capability_classes": TIERED_CLASSES,
}

CLAIMS = {
    "jct_even_speedup": completion.jct_even_speedup,
    "jct_geomean_standard5": completion.jct_geomean_standard5,
    "jct_biased4": completion.jct_biased4,
    "asynchronous_mix": completion.asynchronous_mix,
    "other_baselines": completion.other_baselines,
    "fair_share_met": fairness.fair_share_met,
    "tier_matching": matching.tier_matching,
    "full_even_simulation_s": planning.full_even_simulation_s,
    "plan_ms": planning.plan_ms,
    "checkins_per_second_grpc": service.checkins_per_second_grpc,
    "unary_checkins_per_cpu_second": service.unary_checkins_per_cpu_second,
    "live_vs_simulated": service.live_vs_simulated,
    "recovery_after_kill_s": service.recovery_after_kill_s,
}
