"""Every job of the house by ``ray job submit`` on a cluster of several nodes.

Jobs that need another's result come after it; those that serve are submitted, asked at their port,
used by the jobs that name them, and stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Sequence
from typing import Any

from jobs.bench.cluster.nodes import FINISHED, Ended, NodeCluster, in_own_home, several_nodes
from jobs.bench.cluster.workload import Submission, submissions
from raysys import scratch
from raysys.bench import Baseline, Claim, Profile

NODES = 3
CPUS = 2
LIMIT_S = 900.0


def every_job_submitted(profile: Profile) -> Claim:
    """Share of the submitted jobs that ended well (or, being a service, answered and stopped)."""
    results = in_own_home(_measure, profile.full)
    good = sum(bool(result["good"]) for result in results.values())
    return Claim(
        name="every_job_submitted",
        value=good / len(results),
        unit="share",
        better="higher",
        baseline=Baseline(name="all", value=1.0),
        ratio=good / len(results),
        samples={"jobs": results, "nodes": NODES},
    )


def _measure(full: bool) -> dict[str, dict[str, Any]]:
    with scratch.folder("cluster") as folder, several_nodes(NODES, CPUS) as cluster:
        return run_all(cluster, submissions(folder, full=full))


def run_all(cluster: NodeCluster, wanted: Sequence[Submission]) -> dict[str, dict[str, Any]]:
    """Run jobs one after the other, each service from its start to the last job that uses it."""
    results: dict[str, dict[str, Any]] = {}
    services: dict[str, str] = {}
    for number, submission in enumerate(wanted):
        results[submission.name] = _run(cluster, submission, services, results)
        needed = {name for later in wanted[number + 1 :] for name in later.uses}
        for name in [name for name in services if name not in needed]:
            results[name] |= _stop(cluster, services.pop(name))
    return results


def _run(
    cluster: NodeCluster,
    submission: Submission,
    services: dict[str, str],
    results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    missing = [name for name in submission.uses if not results[name]["good"]]
    if missing:
        return {"good": False, "status": "not submitted", "why": f"{missing[0]} failed"}
    job = cluster.submit(submission.words)
    if submission.port:
        services[submission.name] = job
        answered = wait_for_port(cluster, job, submission.port)
        return {"good": answered, "answered": answered}
    cluster.wait(job, LIMIT_S)
    ended = cluster.ended(job)
    return _facts(ended) | {"good": ended.status == "SUCCEEDED"}


def _stop(cluster: NodeCluster, job: str) -> dict[str, Any]:
    if cluster.status(job) not in FINISHED:
        cluster.stop(job)
    return _facts(cluster.ended(job))


def _facts(ended: Ended) -> dict[str, Any]:
    facts = dataclasses.asdict(ended)
    return facts if ended.status == "FAILED" else {k: v for k, v in facts.items() if k != "log"}


def wait_for_port(cluster: NodeCluster, job: str, port: int) -> bool:
    """Whether something listens at a port of the loopback before the job ends."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and cluster.status(job) not in FINISHED:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return True
        time.sleep(0.5)
    return False
