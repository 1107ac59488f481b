"""The jobs on a cluster of several nodes: every one submitted, and two that share it."""

from __future__ import annotations

from jobs.bench.cluster import sharing, submitted
from raysys.bench import ClaimFunction

CONFIG = {"nodes": submitted.NODES, "cpus_per_node": submitted.CPUS, "head_cpus": 0}

CLAIMS: dict[str, ClaimFunction] = {
    "every_job_submitted": submitted.every_job_submitted,
    "two_jobs_share": sharing.two_jobs_share,
}
